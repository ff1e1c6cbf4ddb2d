"""Output of a run for its user: live progress, tables, curves, comparisons and the viewer of episodes."""
