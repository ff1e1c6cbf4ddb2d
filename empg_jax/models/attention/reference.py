"""Packed attention by dense matrices: the reference of tests and parity checks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def reference_attention(
    queries: Float[Array, "B T H d"],
    keys: Float[Array, "B T K d"],
    values: Float[Array, "B T K d"],
    segment_ids: Int[Array, "B T"],
    trunk_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H d"]:
    """Compute ``softmax(q k^T / sqrt(d)) v`` over the token itself and what it sees before it.

    A token sees earlier tokens of its segment and of its trunk. The computation is in float32 (float64 for
    float64 inputs) and holds ``[B, H, T, T]`` scores in memory.

    Args:
      queries: rotated queries.
      keys: rotated keys.
      values: values.
      segment_ids: packed sequence of each token.
      trunk_ids: the segment that each token's own one continues, -1 for none (`trunks`); None: no trunks.

    Returns:
      The output, in the type of the queries.
    """
    length, groups = queries.shape[1], queries.shape[2] // keys.shape[2]
    wide = jnp.promote_types(queries.dtype, jnp.float32)
    q, k, v = (x.astype(wide) for x in (queries, keys, values))
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * queries.shape[3] ** -0.5
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    if trunk_ids is not None:
        same = jnp.logical_or(same, trunk_ids[:, :, None] == segment_ids[:, None, :])
    visible = jnp.logical_and(same, jnp.tri(length, dtype=bool)[None])[:, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v).astype(queries.dtype)
