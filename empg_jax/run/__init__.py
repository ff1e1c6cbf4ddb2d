"""A run: how its parts are made from a configuration, and what it keeps on disk."""
