"""The supervised warm start before RL, on an expert's demonstrations or on chat files."""
