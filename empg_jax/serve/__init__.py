"""The policy behind HTTP: the OpenAI wire, and token ids in and out."""
