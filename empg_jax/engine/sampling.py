"""Sampling as pure functions: keyed uniforms and inverse-CDF draws.

A sample depends only on (run seed, stream, group, member, turn, position), never on its neighbors in the
batch. One uniform per token and an inverse CDF cost almost nothing next to the softmax; Gumbel noise over the
whole vocabulary costs about a fifth of the decoding time on a CPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from empg_jax.models.filtering import find_reach
from empg_jax.parallel.layout import num_shards

# The inverse CDF first finds a block of this many vocabulary entries and then searches inside the block: one
# running sum over the whole vocabulary is slower.
BLOCK = 128
# A lower temperature changes nothing more; its quotients would overflow.
COLDEST = np.float32(1e-30)


def fold_keys(key: Array, ids: Array) -> Array:
    """Fold ``key`` with every number of a row in turn, which gives one key per row.

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
    """Draw uniforms in [0, 1), float32[R, n], for ``keys[R]`` at response positions ``int32[R, n]``."""

    def draw(key: Array, position: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, position))

    return jax.vmap(jax.vmap(draw, in_axes=(None, 0)))(keys, positions)


def sample(logits: Array, uniforms: Array, temperature: Array) -> tuple[Array, Array, Array]:
    """Draw one token per row by inverse CDF; return it with its log-probability and the entropy.

    Args:
      logits: float[R, V].
      uniforms: float32[R] in [0, 1).
      temperature: float32 scalar or float32[R], divides the logits; 0 takes the most likely token (statistics
        at 1).

    Returns:
      ``(tokens int32[R], logprobs float32[R], entropies float32[R])``; statistics at the temperature, over
      the full vocabulary, in nats.
    """
    shifted, is_greedy = _shift(logits, uniforms, temperature)
    weights = jnp.exp(shifted)
    drawn, total = _draw(weights, uniforms)
    tokens = jnp.where(is_greedy, _best(shifted), drawn)
    log_total, chosen = jnp.log(total), _at(shifted, tokens)
    entropies = log_total - jnp.sum(weights * shifted, axis=-1) / total
    return tokens, chosen - log_total, entropies


def sample_filtered(
    logits: Array, uniforms: Array, temperature: Array, filters: Array
) -> tuple[Array, Array, Array, Array]:
    """Draw as `sample` does, among the tokens that each row's filter keeps.

    Args:
      logits: float[R, V].
      uniforms: float32[R] in [0, 1).
      temperature: as in `sample`.
      filters: float32[R, 3], options in the order of `models.filtering.TokenFilter`.

    Returns:
      ``(tokens, logprobs, entropies, full_logprobs)``. Log-probabilities are those of the filtered
      distribution, which the token was drawn from; entropies and full log-probabilities are those of the
      distribution over the whole vocabulary, because uncertainty is a property of the policy. All are at the
      temperature, in nats.
    """
    shifted, is_greedy = _shift(logits, uniforms, temperature)
    weights = jnp.exp(shifted)
    is_kept = -shifted <= find_reach(-shifted, filters)[:, None]
    drawn, kept = _draw(jnp.where(is_kept, weights, jnp.float32(0.0)), uniforms)
    tokens = jnp.where(is_greedy, _best(shifted), drawn)
    total = jnp.sum(weights, axis=-1)
    chosen, log_total = _at(shifted, tokens), jnp.log(total)
    entropies = log_total - jnp.sum(weights * shifted, axis=-1) / total
    return tokens, chosen - jnp.log(kept), entropies, chosen - log_total


def _shift(logits: Array, uniforms: Array, temperature: Array) -> tuple[Array, Array]:
    """Return the logits at the temperature, minus the largest one, and which rows are greedy."""
    temperatures = jnp.broadcast_to(temperature, uniforms.shape)
    is_greedy = temperatures == 0
    divisors = jnp.where(is_greedy, jnp.float32(1.0), jnp.maximum(temperatures, COLDEST))
    wide = logits.astype(jnp.float32)
    # The largest logit becomes 0, so the exponentials cannot overflow. It is subtracted before the division:
    # the other way round a compiler may round both in one, and the largest quotient's result would not be 0.
    return (wide - jnp.max(wide, axis=-1, keepdims=True)) / divisors[:, None], is_greedy


def _best(shifted: Array) -> Array:
    """Return the first entry at the maximum, which is 0.

    An argmax, which carries values along, costs a quarter of a decode step.
    """
    places = jnp.arange(shifted.shape[-1], dtype=jnp.int32)[None, :]
    return jnp.min(jnp.where(shifted == 0, places, jnp.int32(shifted.shape[-1] - 1)), axis=-1)


def _draw(weights: Array, uniforms: Array) -> tuple[Array, Array]:
    """Find the index where the running sum of ``weights[R, V]`` passes ``uniforms * total``.

    Returns:
      ``(indices int32[R], totals float32[R])``. An entry of weight zero is never drawn.
    """
    rows, vocab = weights.shape
    parts = num_shards("vocab")
    if vocab % parts:
        parts = 1  # every device has all of it
    # Blocks lie within a device's part: else all weights would be gathered for every token.
    part = vocab // parts
    blocks = -(-part // BLOCK)
    grid = jnp.pad(weights.reshape(rows, parts, part), ((0, 0), (0, 0), (0, blocks * BLOCK - part)))
    grid = grid.reshape(rows, parts * blocks, BLOCK)
    each = jnp.sum(grid, axis=-1)
    sums = jnp.cumsum(each, axis=-1)
    totals = sums[:, -1]
    threshold = uniforms * totals
    block = _passed(each, sums, threshold)
    before = jnp.where(block > 0, _at(sums, jnp.maximum(block - 1, 0)), jnp.float32(0.0))
    inside = jnp.take_along_axis(grid, block[:, None, None], axis=1)[:, 0]
    start = block // blocks * part + block % blocks * BLOCK
    return start + _passed(inside, jnp.cumsum(inside, axis=-1), threshold - before), totals


def _passed(weights: Array, sums: Array, threshold: Array) -> Array:
    """Return the first index with a weight above zero whose running sum exceeds the threshold.

    Rounding may leave the threshold at or above the last sum. The draw is then the last entry with a weight
    above zero. Running sums are added up in parallel, so that they may rise a little where no weight is.
    """
    places = jnp.arange(sums.shape[-1], dtype=jnp.int32)[None, :]
    is_weighty = weights > 0
    is_beyond = jnp.logical_and(is_weighty, sums > threshold[:, None])
    first = jnp.min(jnp.where(is_beyond, places, jnp.int32(sums.shape[-1])), axis=-1)
    last = jnp.max(jnp.where(is_weighty, places, jnp.int32(0)), axis=-1)
    return jnp.minimum(first, last)


def _at(values: Array, index: Array) -> Array:
    return jnp.take_along_axis(values, index[:, None], axis=-1)[:, 0]
