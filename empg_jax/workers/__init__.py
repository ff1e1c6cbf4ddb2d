"""Environment workers: processes, their supervisor, and what is done about faults. Knows no JAX."""
