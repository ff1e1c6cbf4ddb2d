"""A procedurally generated text household with the command grammar of ALFWorld 2.1.2."""
