"""Output of a run for its user: live progress, tables, curves, transcripts and a trajectory viewer."""
