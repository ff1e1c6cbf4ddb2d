"""Joined heads in the cache: two key/value heads of 64 numbers side by side, as a TPU's tile has 128.

A query has its numbers in its own head's part and zeros in the others, so that its scores are those of its
head, and so is this part of the output. The cache is no larger. Where the widths are equal, all of this
changes nothing.

Shapes: ``J`` joined heads of ``w`` numbers are ``K = J * w / d`` heads of ``d``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def join(new: Float[Array, "R T K d"], width: int) -> Float[Array, "R T J w"]:
    """Put neighbouring heads side by side."""
    return new.reshape(*new.shape[:2], -1, width)


def separate(rows: Float[Array, "R J C w"], depth: int) -> Float[Array, "R K C d"]:
    """Take the heads of cached keys, or values, apart: a copy."""
    count, heads, capacity, width = rows.shape
    if width == depth:
        return rows
    apart = rows.reshape(count, heads, capacity, width // depth, depth)
    return jnp.moveaxis(apart, 3, 2).reshape(count, -1, capacity, depth)


def spread(queries: Float[Array, "*R H d"], heads: int, width: int) -> Float[Array, "*R H w"]:
    """Put queries into their own head's part of the width, for ``heads`` joined key/value heads."""
    *rows, count, depth = queries.shape
    if width == depth:
        return queries
    grouped = _by_head(queries, heads, width // depth)
    wide = jnp.where(_is_own(width // depth, len(rows)), grouped[..., None, :], jnp.zeros((), queries.dtype))
    return wide.reshape(*rows, count, width)


def narrow(output: Float[Array, "*R H w"], heads: int, depth: int) -> Float[Array, "*R H d"]:
    """Take the own head's part of each query's output."""
    *rows, count, width = output.shape
    if width == depth:
        return output
    parts = width // depth
    wide = _by_head(output, heads, parts).reshape(*rows, heads, parts, -1, parts, depth)
    own = jnp.where(_is_own(parts, len(rows)), wide, jnp.zeros((), output.dtype))
    return jnp.sum(own, axis=-2).reshape(*rows, count, depth)


def _by_head(array: jax.Array, heads: int, parts: int) -> jax.Array:
    """Return ``[*R, joined heads, parts, group, d]``."""
    *rows, count, depth = array.shape
    return array.reshape(*rows, heads, parts, count // (heads * parts), depth)


def _is_own(parts: int, rows: int) -> jax.Array:
    """Return ``[..., parts, 1, parts, 1]``: true where a query's head is the part of the width."""
    return jnp.eye(parts, dtype=bool).reshape(*[1] * (rows + 1), parts, 1, parts, 1)
