"""Episodes: what runs between the sampling engine and the environment workers."""
