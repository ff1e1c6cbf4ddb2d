"""Attention over rows with trunks: beginnings that several segments share and that stand in the row once.

A token sees itself, the earlier tokens of its own segment, and all tokens of its segment's trunk, which stand
earlier in the row. Rows with trunks are long and each segment sees a small part of its row, so the row is cut
into tiles and the tiles of keys that no query of a tile sees are skipped. Which ones these are depends on the
data, so the loops are loops of the compiled program (`tiles` unrolls its blocks instead). The code is plain
XLA on every platform: the fused kernels of `packed` compare one id per token and cannot express a trunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from empg_jax.models.attention.cached import MASKED
from empg_jax.models.attention.packed import SAVED

TILE = 64  # tokens; longer rows get larger tiles
MOST_TILES = 64  # of a row


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
      tile: length of a tile; default by the row's length (`tile_size`).

    Returns:
      The attention output, in the type of the queries. At padding it is finite but otherwise undefined.
    """
    return _attention(queries, keys, values, segments, tile or tile_size(queries.shape[1]))


def tile_size(length: int) -> int:
    """Return the default length of a tile in rows of ``length`` tokens."""
    tile = TILE
    while tile * MOST_TILES < length:
        tile *= 2
    return tile


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(queries: Array, keys: Array, values: Array, segments: Segments, tile: int) -> Array:
    return _forward(queries, keys, values, segments, tile)[0]


class _Tiles(NamedTuple):
    """The ids of each tile, and its plan of work: the tiles of keys that it sees."""

    ids: Int[Array, "n B t"]
    trunk_ids: Int[Array, "n B t"]
    order: Int[Array, "n n"]  # per tile of queries: first the tiles that it sees, in order
    counts: Int[Array, "n"]  # their number


def _plan(segments: Segments, tile: int) -> _Tiles:
    ids = _cut(segments.ids, tile, fill=0)
    trunk_ids = _cut(segments.trunk_ids, tile, fill=-1)
    seen = _find_seen(ids, trunk_ids)
    order = jnp.argsort(jnp.logical_not(seen), axis=1, stable=True).astype(jnp.int32)
    return _Tiles(ids, trunk_ids, order, jnp.sum(seen, axis=1, dtype=jnp.int32))


def _find_seen(ids: Int[Array, "n B t"], trunk_ids: Int[Array, "n B t"]) -> Bool[Array, "n n"]:
    """Find which tiles of queries (first axis) may see something in which tiles of keys.

    Ids ascend along a row, so two tiles can share a segment only if their ranges of ids overlap. Where that
    errs, it errs to the safe side: the mask inside the tile decides.
    """
    most = jnp.iinfo(ids.dtype).max

    def ranges(x: Array, is_real: Array) -> tuple[Array, Array]:
        return jnp.min(jnp.where(is_real, x, most), axis=2), jnp.max(jnp.where(is_real, x, -1), axis=2)

    lowest, highest = ranges(ids, ids > 0)  # [n B]; an empty range overlaps with none
    first, last = ranges(trunk_ids, trunk_ids > 0)

    def overlap(low: Array, high: Array) -> Array:
        return jnp.logical_and(low[:, None] <= highest[None], lowest[None] <= high[:, None])

    seen = jnp.any(jnp.logical_or(overlap(lowest, highest), overlap(first, last)), axis=2)
    # Every tile sees itself, so that no query, padding included, is without any key.
    return jnp.logical_or(jnp.logical_and(seen, jnp.tri(len(ids), dtype=bool)), jnp.eye(len(ids), dtype=bool))


def _forward(
    queries: Array, keys: Array, values: Array, segments: Segments, tile: int
) -> tuple[Array, tuple[Array | Segments, ...]]:
    plan = _plan(segments, tile)
    heads, length = keys.shape[2], queries.shape[1]
    q, k, v = _by_tile(queries, heads, tile), _by_tile(keys, heads, tile), _by_tile(values, heads, tile)
    scale, groups = jnp.float32(queries.shape[3] ** -0.5), queries.shape[2] // heads

    def one_tile(place: Array) -> tuple[Array, Array]:
        q_tile = q[place]

        def step(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            largest, total, weighted = carry
            other = plan.order[place, number]
            scores = _dot("bkqd,bksd->bkqs", q_tile, k[other]) * scale
            scores = jnp.where(_visible(plan, place, other, groups), scores, jnp.float32(MASKED))
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
            decay, weights = jnp.exp(largest - new_largest), jnp.exp(scores - new_largest[..., None])
            here = _dot("bkqs,bksd->bkqd", weights.astype(values.dtype), v[other])
            total = total * decay + jnp.sum(weights, axis=-1)
            return new_largest, total, weighted * decay[..., None] + here

        zeros = jnp.zeros(q_tile.shape[:-1], jnp.float32)
        start = zeros + MASKED, zeros, jnp.zeros(q_tile.shape, jnp.float32)
        largest, total, weighted = jax.lax.fori_loop(0, plan.counts[place], step, start)
        return (weighted / total[..., None]).astype(queries.dtype), largest + jnp.log(total)

    outputs, normalizers = jax.lax.map(one_tile, jnp.arange(len(q), dtype=jnp.int32))
    output = checkpoint_name(_from_tiles(outputs, groups, length), SAVED)
    normalizer = checkpoint_name(normalizers, SAVED)
    return output, (queries, keys, values, segments, output, normalizer)


def _backward(
    tile: int, residuals: tuple[Array, Array, Array, Segments, Array, Array], slope: Array
) -> tuple[Array, Array, Array, None]:
    queries, keys, values, segments, output, normalizer = residuals
    plan = _plan(segments, tile)
    heads, length = keys.shape[2], queries.shape[1]
    scale, groups = jnp.float32(queries.shape[3] ** -0.5), queries.shape[2] // heads
    q, k, v = _by_tile(queries, heads, tile), _by_tile(keys, heads, tile), _by_tile(values, heads, tile)
    g = _by_tile(slope, heads, tile)
    # The softmax's gradient is w * (dw - sum(w dw)); sum(w dw) equals the dot product of slope and output.
    product = g.astype(jnp.float32) * _by_tile(output, heads, tile).astype(jnp.float32)
    mean_slope = jnp.sum(product, axis=-1)

    def one_tile(sums: tuple[Array, Array], place: Array) -> tuple[tuple[Array, Array], Array]:
        q_tile, g_tile = q[place], g[place]

        def step(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_query, d_keys, d_values = carry
            other = plan.order[place, number]
            scores = _dot("bkqd,bksd->bkqs", q_tile, k[other]) * scale
            scores = jnp.where(_visible(plan, place, other, groups), scores, jnp.float32(MASKED))
            weights = jnp.exp(scores - normalizer[place][..., None])
            d_weights = _dot("bkqd,bksd->bkqs", g_tile, v[other])
            d_scores = weights * (d_weights - mean_slope[place][..., None]) * scale
            weights, d_scores = weights.astype(values.dtype), d_scores.astype(queries.dtype)
            d_values = d_values.at[other].add(_dot("bkqs,bkqd->bksd", weights, g_tile))
            d_keys = d_keys.at[other].add(_dot("bkqs,bkqd->bksd", d_scores, q_tile))
            return d_query + _dot("bkqs,bksd->bkqd", d_scores, k[other]), d_keys, d_values

        start = jnp.zeros(q_tile.shape, jnp.float32), *sums
        d_query, *sums_after = jax.lax.fori_loop(0, plan.counts[place], step, start)
        return (sums_after[0], sums_after[1]), d_query

    zeros = jnp.zeros(k.shape, jnp.float32)
    (d_keys, d_values), d_queries = jax.lax.scan(
        one_tile, (zeros, zeros), jnp.arange(len(q), dtype=jnp.int32)
    )
    return (
        _from_tiles(d_queries, groups, length).astype(queries.dtype),
        _from_tiles(d_keys, 1, length).astype(keys.dtype),
        _from_tiles(d_values, 1, length).astype(values.dtype),
        None,
    )


_attention.defvjp(_forward, _backward)

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _visible(plan: _Tiles, place: Array, other: Array, groups: int) -> Bool[Array, "B 1 q s"]:
    """Return which keys of tile ``other`` the queries of tile ``place`` see; queries ``[groups, t]``."""
    size = plan.ids.shape[2]
    within = jnp.arange(size, dtype=jnp.int32)
    causal = place * size + within[:, None] >= other * size + within[None, :]
    own, trunk, theirs = plan.ids[place], plan.trunk_ids[place], plan.ids[other]
    same = jnp.logical_or(own[:, :, None] == theirs[:, None], trunk[:, :, None] == theirs[:, None])
    return jnp.tile(jnp.logical_and(causal[None], same), (1, groups, 1))[:, None]


def _cut(x: Int[Array, "B T"], tile: int, fill: int) -> Int[Array, "n B t"]:
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile)), constant_values=fill)
    return jnp.swapaxes(padded.reshape(len(x), -1, tile), 0, 1)


def _by_tile(x: Float[Array, "B T H d"], kv_heads: int, tile: int) -> Float[Array, "n B K Gt d"]:
    """Cut ``x`` along time, with each key/value head's group of query heads in one matrix."""
    batch, length, heads, depth = x.shape
    padded = jnp.pad(x, ((0, 0), (0, -length % tile), (0, 0), (0, 0)))
    cut = padded.reshape(batch, -1, tile, kv_heads, heads // kv_heads, depth)
    return jnp.transpose(cut, (1, 0, 3, 4, 2, 5)).reshape(cut.shape[1], batch, kv_heads, -1, depth)


def _from_tiles(x: Float[Array, "n B K Gt d"], groups: int, length: int) -> Float[Array, "B T H d"]:
    count, batch, kv_heads, rows, depth = x.shape
    cut = x.reshape(count, batch, kv_heads, groups, rows // groups, depth)
    whole = jnp.transpose(cut, (1, 0, 4, 2, 3, 5)).reshape(batch, -1, kv_heads * groups, depth)
    return whole[:, :length]
