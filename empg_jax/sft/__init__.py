"""Supervised warm start: demonstrations of an expert or chat files, before RL."""
