"""Sampling as pure functions: keyed uniforms and inverse-CDF draws.

A sample depends only on (run seed, stream, group, member, turn, position), never on its neighbours in the
batch. One uniform per token and an inverse CDF cost nothing beside the soft-max; Gumbel noise over the
vocabulary costs about a fifth of decoding on a CPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from empg_jax.models.head import token_statistics


def fold_keys(key: Array, ids: Array) -> Array:
    """One key per row: ``key`` folded with every number of that row in turn.

    Args:
      key: the run's typed key.
      ids: int32[R, n], for example (stream, group, member, turn).

    Returns:
      Typed keys ``[R]``.
    """

    def fold(row: Array) -> Array:
        row_key = key
        for i in range(ids.shape[1]):
            row_key = jax.random.fold_in(row_key, row[i])
        return row_key

    return jax.vmap(fold)(ids)


def position_uniforms(keys: Array, positions: Array) -> Array:
    """Uniforms in [0, 1) for ``keys[R]`` at response positions ``int32[R, n]``: float32[R, n]."""

    def draw(key: Array, position: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, position))

    return jax.vmap(jax.vmap(draw, in_axes=(None, 0)))(keys, positions)


def sample(logits: Array, uniforms: Array, temperature: Array) -> tuple[Array, Array, Array]:
    """Draw one token per row by inverse CDF.

    Args:
      logits: float[R, V].
      uniforms: float32[R] in [0, 1).
      temperature: float32 scalar, divides the logits; 0 takes the most likely token (statistics at 1).

    Returns:
      ``(tokens int32[R], logprobs float32[R], entropies float32[R])``; statistics at the temperature.
    """
    is_greedy = temperature == 0
    scaled = logits.astype(jnp.float32) / jnp.where(is_greedy, jnp.float32(1.0), temperature)
    weights = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))
    cumulative = jnp.cumsum(weights, axis=-1)
    threshold = uniforms * cumulative[:, -1]
    below = cumulative <= threshold[:, None]
    tokens = jnp.sum(below, axis=-1, dtype=jnp.int32)
    # Rounding can push the threshold to the total itself; the last entry is then the draw.
    tokens = jnp.minimum(tokens, jnp.int32(logits.shape[-1] - 1))
    tokens = jnp.where(is_greedy, jnp.argmax(scaled, axis=-1).astype(jnp.int32), tokens)
    logprobs, entropies = token_statistics(scaled, tokens)
    return tokens, logprobs, entropies
