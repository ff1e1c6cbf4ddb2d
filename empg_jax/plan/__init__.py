"""The memory plan: the bytes that a run needs on each device, and their presentation as text."""
