"""Attention against a plain loop over rows, heads and positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.models.attention import cached_attention, packed_attention

packed = jax.jit(packed_attention, static_argnames="tile")


def attend_by_hand(query, keys, values):
    """One query ``[d]`` over visible keys ``[s, d]``, in float64."""
    scores = keys.astype(np.float64) @ query.astype(np.float64) / np.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    return weights / weights.sum() @ values.astype(np.float64)


def oracle_packed(queries, keys, values, segment_ids):
    output = np.zeros(queries.shape)
    rows, length, heads, _ = queries.shape
    group = heads // keys.shape[2]
    for b in range(rows):
        for t in range(length):
            seen = [s for s in range(t + 1) if segment_ids[b, s] == segment_ids[b, t]]
            for h in range(heads):
                output[b, t, h] = attend_by_hand(
                    queries[b, t, h], keys[b, seen, h // group], values[b, seen, h // group]
                )
    return output


def make_inputs(length, heads=4, kv_heads=2, depth=8, rows=2, seed=0):
    generator = np.random.default_rng(seed)

    def draw(n):
        return generator.normal(size=(rows, length, n, depth)).astype(np.float32)

    return draw(heads), draw(kv_heads), draw(kv_heads)


# A row of three segments and padding, and a row that is one segment.
def make_segments(length):
    cut, end = length // 3, length - length // 5
    row = np.ones(length, np.int32)
    row[cut : 2 * cut], row[2 * cut : end], row[end:] = 2, 3, 0
    return np.stack([row, np.ones(length, np.int32)])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length, tile", [(16, 4), (16, 64), (19, 4), (1, 4), (37, 2)])
def test_packed_attention_equals_the_loop(length, tile, kv_heads):
    inputs = make_inputs(length, kv_heads=kv_heads)
    segments = make_segments(length)
    found = packed(*inputs, segments, tile=tile)
    np.testing.assert_allclose(found, oracle_packed(*inputs, segments), atol=2e-6)


def test_gradients_do_not_depend_on_the_tile():
    inputs = [jnp.asarray(x) for x in make_inputs(19)]
    segments = jnp.asarray(make_segments(19))

    def loss(inputs, tile):
        output = packed_attention(*inputs, segments, tile=tile)
        return jnp.sum(jnp.sin(output) * (segments > 0)[:, :, None, None].astype(jnp.float32))

    slope = jax.jit(jax.grad(loss), static_argnums=1)
    tiled, whole = (slope(inputs, tile) for tile in (5, 64))
    for one, other in zip(tiled, whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_nothing_crosses_segments_or_comes_from_later():
    queries, keys, values = make_inputs(16)
    segments = make_segments(16)
    changed_keys, changed_values = keys.copy(), values.copy()
    changed_keys[0, 5:10], changed_values[0, 5:10] = 77.0, -55.0  # the middle segment of row 0
    changed_keys[1, 12:], changed_values[1, 12:] = 77.0, -55.0  # the end of row 1
    before = np.asarray(packed(queries, keys, values, segments, tile=4))
    after = np.asarray(packed(queries, changed_keys, changed_values, segments, tile=4))
    others = np.r_[0:5, 10:16]
    np.testing.assert_array_equal(before[0, others], after[0, others])
    np.testing.assert_array_equal(before[1, :12], after[1, :12])
    assert np.abs(before[0, 5:10] - after[0, 5:10]).max() > 1
    assert np.abs(before[1, 12:] - after[1, 12:]).max() > 1


def test_bfloat16_goes_in_and_out_with_float32_softmax():
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in make_inputs(16)]
    segments = make_segments(16)
    found = packed(*inputs, segments, tile=4)
    assert found.dtype == jnp.bfloat16
    wide = [np.asarray(x.astype(jnp.float32)) for x in inputs]
    np.testing.assert_allclose(found.astype(jnp.float32), oracle_packed(*wide, segments), atol=0.03)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cached_attention_equals_the_loop(length, kv_heads):
    capacity, rows = 12, 3
    queries, _, _ = make_inputs(length, rows=rows)
    _, keys, values = make_inputs(capacity, kv_heads=kv_heads, rows=rows, seed=1)
    positions = np.array([0, 4, capacity - length])[:, None] + np.arange(length)
    by_head = [jnp.asarray(x.swapaxes(1, 2)) for x in (keys, values)]
    found = np.asarray(jax.jit(cached_attention)(queries, *by_head, positions))
    for r in range(rows):
        for t in range(length):
            seen = slice(0, positions[r, t] + 1)
            for h in range(4):
                k = h // (4 // kv_heads)
                expected = attend_by_hand(queries[r, t, h], keys[r, seen, k], values[r, seen, k])
                np.testing.assert_allclose(found[r, t, h], expected, atol=2e-6)
