"""A search server for agents, with a neural text encoder in JAX."""
