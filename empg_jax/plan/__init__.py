"""The memory that a run needs on each device: the arithmetic, and the words."""
