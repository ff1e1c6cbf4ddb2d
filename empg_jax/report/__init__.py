"""What a person sees of a run: live progress, tables, curves, transcripts and a trajectory viewer."""
