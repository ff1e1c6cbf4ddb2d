"""Attention of new tokens over a KV cache: two batched products, or a kernel that reads what is filled.

With one query per row the products are bound by reading the cache, whatever computes them. The products read
all of it; on GPUs a decode step therefore takes the kernel of `ragged` where the cache's length allows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from empg_jax.models.attention import ragged
from empg_jax.models.attention.dispatch import by_platform

# Finite, so that a row without any visible key stays finite.
MASKED = -1e30


def cached_attention(
    queries: Float[Array, "R T H d"],
    keys: Float[Array, "R K C d"],
    values: Float[Array, "R K C d"],
    positions: Int[Array, "R T"],
) -> Float[Array, "R T H d"]:
    """Attention of new tokens over a KV cache that already holds them.

    Args:
      queries: rotated queries of the new tokens.
      keys: the cache, key ``c`` at position ``c`` of its row.
      values: likewise.
      positions: position of each new token; it sees the keys at positions up to its own. What comes out for
        a pad, a position beyond the cache, is finite and otherwise not defined.

    Returns:
      The attention output, in the type of the queries.
    """
    capacity = keys.shape[2]
    if queries.shape[1] == 1 and ragged.takes(capacity, queries.shape[3], queries.dtype):
        # A pad sees nothing, so that idle rows cost no reading.
        lengths = jnp.where(positions[:, 0] < capacity, positions[:, 0] + 1, 0)
        return _decode(queries[:, 0], keys, values, lengths)[0][:, None]
    return _attend(queries, keys, values, positions)


def _dense_decode(queries: Array, keys: Array, values: Array, lengths: Array) -> tuple[Array]:
    """The decode step by products over the whole cache."""
    return (_attend(queries[:, None], keys, values, lengths[:, None] - 1)[:, 0],)


_decode = by_platform("decode_attention", _dense_decode, cuda=ragged.decode)


def _attend(queries: Array, keys: Array, values: Array, positions: Array) -> Array:
    rows, length, heads, depth = queries.shape
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    groups = heads // kv_heads
    # Batch axes first: on a CPU the two products are then a fifth of a decode step cheaper.
    grouped = jnp.swapaxes(queries.reshape(rows, length, kv_heads, groups, depth), 1, 2)
    grouped = grouped.reshape(rows, kv_heads, length * groups, depth)
    scores = jnp.einsum("rkqd,rkcd->rkqc", grouped, keys, preferred_element_type=jnp.float32)
    scores = scores * jnp.float32(depth**-0.5)
    visible = jnp.arange(capacity)[None, None, :] <= positions[:, :, None]
    visible = jnp.repeat(visible, groups, axis=1)[:, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.float32(MASKED)), axis=-1)
    output = jnp.einsum("rkqc,rkcd->rkqd", weights.astype(values.dtype), values)
    output = jnp.swapaxes(output.reshape(rows, kv_heads, length, groups, depth), 1, 2)
    return output.reshape(rows, length, heads, depth)
