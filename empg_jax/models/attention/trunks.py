"""Attention over rows with trunks: beginnings that several segments share and that stand in the row once.

A token sees itself, the earlier tokens of its own segment, and all tokens of its segment's trunk, which stand
earlier in the row. It is computed in tiles (`tiles`) on every platform: the fused kernels of `packed` compare
one id per token and cannot express a trunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from empg_jax.models.attention import tiles
from empg_jax.models.attention.operands import Operands
from empg_jax.models.attention.packed import SAVED


class Segments(NamedTuple):
    """The segment of each token of packed rows, and the segment that its own one continues.

    Attributes:
      ids: segment of each token, ascending from 1 along a row; 0 is padding, at the row's end.
      trunk_ids: the trunk of each token's segment, an earlier segment of the row; -1 where there is none.
    """

    ids: Int[Array, "B T"]
    trunk_ids: Int[Array, "B T"]


def trunk_attention(
    queries: Float[Array, "B T H d"],
    keys: Float[Array, "B T K d"],
    values: Float[Array, "B T K d"],
    segments: Segments,
    *,
    tile: int | None = None,
) -> Float[Array, "B T H d"]:
    """Compute causal attention inside each segment and over its trunk.

    Args:
      queries: rotated queries; the first position of a segment follows the last one of its trunk.
      keys: rotated keys.
      values: values.
      segments: segment and trunk of each token.
      tile: length of a tile; default by the row's length (`tiles.tile_size`).

    Returns:
      The attention output, in the type of the queries. At padding it is finite but otherwise undefined.
    """
    return _attention(queries, keys, values, segments, tile)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(queries: Array, keys: Array, values: Array, segments: Segments, tile: int | None) -> Array:
    return _forward(queries, keys, values, segments, tile)[0]


def _forward(
    queries: Array, keys: Array, values: Array, segments: Segments, tile: int | None
) -> tuple[Array, tuple[Array | Segments, ...]]:
    found = tiles.forward(queries, keys, values, *segments, tile=tile)
    output, normalizer = (checkpoint_name(x, SAVED) for x in found)
    return output, (queries, keys, values, segments, output, normalizer)


def _backward(
    tile: int | None, residuals: tuple[Array, Array, Array, Segments, Array, Array], slope: Array
) -> tuple[Array, Array, Array, None]:
    queries, keys, values, segments, output, normalizer = residuals
    operands = Operands(queries, keys, values, segments.ids)
    found = tiles.backward(operands, output, normalizer, slope, segments.trunk_ids, tile=tile)
    return *found, None


_attention.defvjp(_forward, _backward)
