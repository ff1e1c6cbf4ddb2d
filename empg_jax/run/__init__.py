"""A run: construction of its parts from a configuration, and its files on disk."""
