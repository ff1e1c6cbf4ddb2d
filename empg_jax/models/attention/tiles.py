"""The XLA back end: attention in tiles of queries and keys, with a hand-written backward pass.

A tile of queries sees the tiles of keys up to its own. Those in which it can see nothing, because all of
their tokens belong to other segments, are skipped. Which ones these are depends on the data, so the loops are
loops of the compiled program: it is small, and the tables of a tile stay in a CPU's caches. The backward pass
recomputes the weights of a tile from the normalizer, so that no attention weights stay in memory.

A token sees itself, the earlier tokens of its own segment and, in rows with trunks, all tokens of its
segment's trunk (`trunks`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from empg_jax.models.attention.cached import MASKED
from empg_jax.models.attention.operands import Operands

TILE = 64  # tokens; longer rows get larger tiles
# Most tiles of a row. A CPU's caches want small ones, and steps of a loop cost it little; others want few.
MOST_TILES = {"cpu": 64}
FEW_TILES = 16


def tile_size(length: int, most: int | None = None) -> int:
    """Return the length of a tile in rows of ``length`` tokens.

    Args:
      length: tokens of a row.
      most: largest number of tiles; default by platform.
    """
    most, tile = most or MOST_TILES.get(jax.default_backend(), FEW_TILES), TILE
    while tile * most < length:
        tile *= 2
    return tile


def forward(
    queries: Float[Array, "B T H d"],
    keys: Float[Array, "B T K d"],
    values: Float[Array, "B T K d"],
    segment_ids: Int[Array, "B T"],
    trunk_ids: Int[Array, "B T"] | None = None,
    *,
    tile: int | None = None,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B H T"]]:
    """Compute output and normalizer (see `packed`). At padding both are finite but otherwise undefined.

    Args:
      queries: rotated queries.
      keys: rotated keys.
      values: values.
      segment_ids: segment of each token; 0 is padding.
      trunk_ids: the trunk of each token's segment, -1 for none; None where no segment has one.
      tile: length of a tile; default `tile_size`.
    """
    heads, length = keys.shape[2], queries.shape[1]
    tile = tile or tile_size(length)
    plan = _plan(segment_ids, trunk_ids, tile)
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
    levels = _from_tiles(normalizers[..., None], groups, length)[..., 0]
    return _from_tiles(outputs, groups, length), jnp.swapaxes(levels, 1, 2)


def backward(
    operands: Operands,
    output: Float[Array, "B T H d"],
    normalizer: Float[Array, "B H T"],
    slope: Float[Array, "B T H d"],
    trunk_ids: Int[Array, "B T"] | None = None,
    *,
    tile: int | None = None,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B T K d"], Float[Array, "B T K d"]]:
    """Compute the gradients of queries, keys and values (see `packed`)."""
    queries, keys, values, segment_ids = operands
    heads, length = keys.shape[2], queries.shape[1]
    tile = tile or tile_size(length)
    plan = _plan(segment_ids, trunk_ids, tile)
    scale, groups = jnp.float32(queries.shape[3] ** -0.5), queries.shape[2] // heads
    q, k, v = _by_tile(queries, heads, tile), _by_tile(keys, heads, tile), _by_tile(values, heads, tile)
    g = _by_tile(slope, heads, tile)
    levels = _by_tile(jnp.swapaxes(normalizer, 1, 2)[..., None], heads, tile)
    # The softmax's gradient is w * (dw - sum(w dw)); sum(w dw) equals the dot product of slope and output.
    product = g.astype(jnp.float32) * _by_tile(output, heads, tile).astype(jnp.float32)
    mean_slope = jnp.sum(product, axis=-1, keepdims=True)
    # The gradients of keys and values are summed up as ``[d, t]``: products with a transposed table of scores
    # are slow on a CPU, and these transpose a tile of queries, once.
    q_turned, g_turned = jnp.swapaxes(q, -1, -2), jnp.swapaxes(g, -1, -2)

    def one_tile(sums: tuple[Array, Array], place: Array) -> tuple[tuple[Array, Array], Array]:
        q_tile, g_tile = q[place], g[place]

        def step(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_query, d_keys, d_values = carry
            other = plan.order[place, number]
            scores = _dot("bkqd,bksd->bkqs", q_tile, k[other]) * scale
            scores = jnp.where(_visible(plan, place, other, groups), scores, jnp.float32(MASKED))
            weights = jnp.exp(scores - levels[place])
            d_weights = _dot("bkqd,bksd->bkqs", g_tile, v[other])
            d_scores = weights * (d_weights - mean_slope[place]) * scale
            weights, d_scores = weights.astype(values.dtype), d_scores.astype(queries.dtype)
            d_values = d_values.at[other].add(_dot("bkdq,bkqs->bkds", g_turned[place], weights))
            d_keys = d_keys.at[other].add(_dot("bkdq,bkqs->bkds", q_turned[place], d_scores))
            return d_query + _dot("bkqs,bksd->bkqd", d_scores, k[other]), d_keys, d_values

        start = jnp.zeros(q_tile.shape, jnp.float32), *sums
        d_query, *sums_after = jax.lax.fori_loop(0, plan.counts[place], step, start)
        return (sums_after[0], sums_after[1]), d_query

    zeros = jnp.zeros(jnp.swapaxes(k, -1, -2).shape, jnp.float32)
    sums, d_queries = jax.lax.scan(one_tile, (zeros, zeros), jnp.arange(len(q), dtype=jnp.int32))
    d_keys, d_values = (_from_tiles(jnp.swapaxes(x, -1, -2), 1, length) for x in sums)
    return (
        _from_tiles(d_queries, groups, length).astype(queries.dtype),
        d_keys.astype(keys.dtype),
        d_values.astype(values.dtype),
    )


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Plan(NamedTuple):
    """The ids of each tile, and its work: the tiles of keys that it sees."""

    ids: Int[Array, "n B t"]
    trunk_ids: Int[Array, "n B t"] | None
    order: Int[Array, "n n"]  # per tile of queries: first the tiles that it sees, in order
    counts: Int[Array, "n"]  # their number


def _plan(segment_ids: Array, trunk_ids: Array | None, tile: int) -> Plan:
    ids = _cut(segment_ids, tile, fill=0)
    trunks = None if trunk_ids is None else _cut(trunk_ids, tile, fill=-1)
    seen = _find_seen(ids, trunks)
    order = jnp.argsort(jnp.logical_not(seen), axis=1, stable=True).astype(jnp.int32)
    return Plan(ids, trunks, order, jnp.sum(seen, axis=1, dtype=jnp.int32))


def _find_seen(ids: Int[Array, "n B t"], trunk_ids: Int[Array, "n B t"] | None) -> Bool[Array, "n n"]:
    """Find which tiles of queries (first axis) may see something in which tiles of keys.

    Two tiles can share a segment only if their ranges of ids overlap. Where that errs, it errs to the safe
    side: the mask inside the tile decides. Ids ascend along the learner's rows, so that it errs little.
    """
    most = jnp.iinfo(ids.dtype).max

    def ranges(x: Array) -> tuple[Array, Array]:
        is_real = x > 0
        return jnp.min(jnp.where(is_real, x, most), axis=2), jnp.max(jnp.where(is_real, x, -1), axis=2)

    lowest, highest = ranges(ids)  # [n B]; an empty range overlaps with none

    def overlap(low: Array, high: Array) -> Array:
        return jnp.logical_and(low[:, None] <= highest[None], lowest[None] <= high[:, None])

    seen = overlap(lowest, highest)
    if trunk_ids is not None:
        seen = jnp.logical_or(seen, overlap(*ranges(trunk_ids)))
    seen = jnp.logical_and(jnp.any(seen, axis=2), jnp.tri(len(ids), dtype=bool))
    # Every tile sees itself, so that no query, padding included, is without any key.
    return jnp.logical_or(seen, jnp.eye(len(ids), dtype=bool))


def _visible(plan: Plan, place: Array, other: Array, groups: int) -> Bool[Array, "B 1 q s"]:
    """Return which keys of tile ``other`` the queries of tile ``place`` see; queries ``[groups, t]``."""
    size = plan.ids.shape[2]
    within = jnp.arange(size, dtype=jnp.int32)
    causal = place * size + within[:, None] >= other * size + within[None, :]
    theirs = plan.ids[other][:, None]
    same = plan.ids[place][:, :, None] == theirs
    if plan.trunk_ids is not None:
        same = jnp.logical_or(same, plan.trunk_ids[place][:, :, None] == theirs)
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
