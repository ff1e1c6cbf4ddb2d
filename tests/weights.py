"""Weights of small models for tests, made when they are first asked for, not when a module is imported."""

import functools

import jax

from empg_jax.models.decoder import init_params


@functools.cache
def make_weights(model, seed=0):
    """The initial weights of a configuration; the same arrays at every call."""
    return init_params(jax.random.key(seed), model)
