"""How tests compile: each program once for all processes of a session, without most optimizations of XLA.

Compilation is nearly all of what tests on tiny shapes cost.
"""

import contextlib
import os

import jax

QUICK = "jax_disable_most_optimizations"


def _configure(name, value):
    """In this process and those that it starts."""
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value).lower() if isinstance(value, bool) else str(value)


def share_programs(folder):
    """Keep compiled programs in a folder and compile quickly, also in processes that are started later."""
    _configure("jax_compilation_cache_dir", str(folder))
    _configure("jax_persistent_cache_min_compile_time_secs", 0.0)
    _configure("jax_persistent_cache_min_entry_size_bytes", -1)
    _configure(QUICK, True)


@contextlib.contextmanager
def optimized_programs():
    """Compiles with all optimizations meanwhile: for programs that run for long."""
    _configure(QUICK, False)
    jax.clear_caches()  # programs of the two kinds round differently: none meets the other's
    try:
        yield
    finally:
        _configure(QUICK, True)
        jax.clear_caches()
