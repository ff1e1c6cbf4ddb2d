"""Attention over shared beginnings against the dense definition, and the tiles that it leaves out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.models.attention import Segments, reference_attention, trunk_attention
from empg_jax.models.attention.tiles import FEW_TILES, MOST_TILES, TILE, _plan, tile_size

# Pieces of a row: (length, trunk's number or -1). Two families, plain segments between them, padding.
ROW = [(11, -1), (5, 1), (9, 1), (7, -1), (13, -1), (3, 5), (1, 5), (6, 5)]
OTHER = [(20, -1), (12, 1), (17, 1)]


def make_segments(length, *rows):
    ids, trunks = np.zeros((len(rows), length), np.int32), np.full((len(rows), length), -1, np.int32)
    for b, row in enumerate(rows):
        start = 0
        for number, (size, trunk) in enumerate(row, start=1):
            ids[b, start : start + size], trunks[b, start : start + size] = number, trunk
            start += size
    return Segments(jnp.asarray(ids), jnp.asarray(trunks))


def make_inputs(length, heads, kv_heads, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(1), 4)
    sizes = (heads, kv_heads, kv_heads, heads)
    return [jax.random.normal(k, (2, length, n, 8), dtype) for k, n in zip(keys, sizes, strict=True)]


@functools.partial(jax.jit, static_argnames=("attention",))
def pull(attention, arrays, segments, slope):
    output, back = jax.vjp(lambda *x: attention(*x, segments), *arrays)
    return output, *back(slope)


def dense(queries, keys, values, segments):
    return reference_attention(queries, keys, values, *segments)


@pytest.mark.parametrize(
    "tile, length, heads, kv_heads, dtype, tolerance",
    [
        (4, 61, 4, 2, jnp.float32, 2e-6),
        (128, 64, 2, 2, jnp.float32, 2e-6),
        (16, 61, 4, 2, jnp.bfloat16, 0.06),
    ],
)
def test_output_and_gradients_equal_the_definition(tile, length, heads, kv_heads, dtype, tolerance):
    segments = make_segments(length, ROW, OTHER)
    *arrays, slope = make_inputs(length, heads, kv_heads, dtype)
    real = np.asarray(segments.ids) > 0
    slope = slope * real[:, :, None, None].astype(dtype)
    found = pull(functools.partial(trunk_attention, tile=tile), tuple(arrays), segments, slope)
    wide = [x.astype(jnp.float32) for x in (*arrays, slope)]
    expected = pull(dense, tuple(wide[:3]), segments, wide[3])
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        ours = np.asarray(ours.astype(jnp.float32))
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours[real], np.asarray(exact)[real], atol=tolerance, rtol=tolerance)


def test_a_branch_is_its_whole_sequence():
    """The definition of the mask itself: each branch behind its trunk, alone, by a plain softmax."""
    segments = make_segments(64, ROW, ROW)
    q, k, v, _ = make_inputs(64, 2, 1)
    found = np.asarray(jax.jit(functools.partial(trunk_attention, tile=16))(q, k, v, segments))
    q, k, v, ids = (np.asarray(x, np.float64) for x in (q[0, :, 1], k[0, :, 0], v[0, :, 0], segments.ids[0]))
    for number, (size, trunk) in enumerate(ROW, start=1):
        own = np.flatnonzero((ids == trunk) | (ids == number))
        scores = np.where(np.tri(len(own)), q[own] @ k[own].T / np.sqrt(8), -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        alone = weights / weights.sum(axis=1, keepdims=True) @ v[own]
        np.testing.assert_allclose(found[0, ids == number, 1], alone[-size:], atol=2e-6)


def test_tiles_of_other_segments_are_left_out():
    """Sixteen branches of a tile each behind a trunk of two: each sees the trunk and itself."""
    segments = make_segments(18 * 8, [(16, -1), *[(8, 1)] * 16])
    plan = jax.jit(_plan, static_argnums=2)(*segments, 8)
    seen = [set(order[:count].tolist()) for order, count in zip(plan.order, plan.counts, strict=True)]
    assert seen == [{0}, {0, 1}, *({0, 1, place} for place in range(2, 18))]


def test_long_rows_have_larger_tiles():
    for most in (FEW_TILES, MOST_TILES["cpu"]):
        assert tile_size(100, most) == tile_size(TILE * most, most) == TILE
        assert tile_size(TILE * most + 1, most) == 2 * TILE


def test_packed_rows_leave_out_the_tiles_of_other_segments():
    """Three segments of two tiles each, then padding of two: a tile sees its own segment's, up to itself."""
    ids = jnp.asarray(np.repeat([1, 2, 3, 0], 16)[None])
    plan = jax.jit(lambda ids: _plan(ids, None, 8))(ids)
    seen = [set(order[:count].tolist()) for order, count in zip(plan.order, plan.counts, strict=True)]
    assert seen == [{0}, {0, 1}, {2}, {2, 3}, {4}, {4, 5}, {6}, {7}]
