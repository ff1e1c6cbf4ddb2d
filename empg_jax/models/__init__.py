"""The decoder, its head, and its exchange with Hugging Face files."""
