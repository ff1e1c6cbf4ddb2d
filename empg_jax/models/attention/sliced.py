"""Attention of a slice of each row's queries to the whole row, for devices that split time but not heads.

Every device holds all keys and values of its rows and its own part of the queries. The causal triangle is not
cut along the slices, so a device computes every key: twice the work of attention over whole rows. It is the
way out where there are fewer heads than devices; `parallel.layout.split_attention` chooses it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from empg_jax.models.attention.cached import MASKED

BLOCK = 256  # queries whose scores are in memory at one time


def sliced_attention(
    queries: Float[Array, "B t H d"],
    keys: Float[Array, "B T K d"],
    values: Float[Array, "B T K d"],
    segment_ids: Int[Array, "B T"],
    start: Int[Array, ""],
) -> Float[Array, "B t H d"]:
    """Compute packed attention for the queries at positions ``start`` to ``start + t`` of each row.

    Args:
      queries: rotated queries of the slice.
      keys: rotated keys of the whole rows.
      values: values of the whole rows.
      segment_ids: packed sequence of each token.
      start: place of the first query.

    Returns:
      The attention output, in the type of the queries.
    """
    batch, length, heads, depth = queries.shape
    size = min(BLOCK, length)
    starts = jnp.arange(0, length, size, dtype=jnp.int32)
    padded = jnp.pad(queries, ((0, 0), (0, starts.size * size - length), (0, 0), (0, 0)))
    grouped = padded.reshape(batch, starts.size, size, keys.shape[2], heads // keys.shape[2], depth)
    attend = jax.checkpoint(functools.partial(_attend, keys, values, segment_ids))
    # A loop: of blocks side by side, the compiler keeps the scores of several at a time.
    outputs = jax.lax.map(lambda block: attend(*block), (jnp.moveaxis(grouped, 1, 0), start + starts))
    return jnp.moveaxis(outputs, 0, 1).reshape(padded.shape)[:, :length]


def _attend(keys: Array, values: Array, segment_ids: Array, queries: Array, start: Array) -> Array:
    """Compute one block, ``[B t K G d]``; its scores are computed again for the gradient.

    Queries beyond the row have any result.
    """
    places = start + jnp.arange(queries.shape[1], dtype=jnp.int32)
    own = jnp.take(segment_ids, places, axis=1)
    causal = places[:, None] >= jnp.arange(keys.shape[1], dtype=jnp.int32)[None, :]
    visible = jnp.logical_and(causal[None], own[:, :, None] == segment_ids[:, None, :])[:, None, None]
    scores = jnp.einsum("btkgd,bskd->bkgts", queries, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores * jnp.float32(queries.shape[-1] ** -0.5), jnp.float32(MASKED))
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    output = jnp.einsum("bkgts,bskd->btkgd", weights, values, preferred_element_type=jnp.float32)
    return output.astype(queries.dtype)
