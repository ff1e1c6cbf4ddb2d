"""The device mesh and the rules that split arrays over it."""
