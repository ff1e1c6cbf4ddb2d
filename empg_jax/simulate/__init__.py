"""A simulated run: the real ledger between a simulated sampler and learner, on a simulated clock."""
