"""How tests compile: without most of XLA's optimizations where programs run a few times on tiny shapes."""

import contextlib
import os

import jax

NAME = "jax_disable_most_optimizations"


def is_quick():
    """Whether most optimizations are switched off."""
    return NAME.upper() in os.environ


def compile_quickly(is_on):
    """Switch most optimizations off (or on again), in processes that are started from now on, too."""
    if is_quick() == is_on:
        return
    jax.config.update(NAME, is_on)
    if is_on:
        os.environ[NAME.upper()] = "true"
    else:
        del os.environ[NAME.upper()]
    jax.clear_caches()  # programs of the two kinds round differently: none meets the other's


@contextlib.contextmanager
def quick_compilations(is_on=True):
    """Leaves out most optimizations meanwhile (or leaves them in)."""
    before = is_quick()
    compile_quickly(is_on)
    try:
        yield
    finally:
        compile_quickly(before)
