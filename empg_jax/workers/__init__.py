"""Environment workers: processes, their supervisor, and the handling of faults. Independent of JAX."""
