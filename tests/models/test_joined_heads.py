"""Joined heads: several narrow key/value heads of the cache side by side give the numbers of single ones."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.engine.programs import lay_out
from empg_jax.models.attention.cached import cached_attention
from empg_jax.models.attention.joined import join, narrow, separate, spread
from empg_jax.models.decoder import (
    DecoderConfig,
    forward_cached,
    init_cache,
    init_params,
    init_pool,
    unstack_layers,
)

ROWS, HEADS, KV_HEADS, DEPTH, LENGTH = 2, 8, 4, 4, 5


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.mark.parametrize("joined", [1, 2, 4])
def test_joined_heads_are_taken_apart_again(joined):
    new = draw(ROWS, LENGTH, KV_HEADS, DEPTH)
    rows = jnp.moveaxis(join(new, joined * DEPTH), 2, 1)
    assert rows.shape == (ROWS, KV_HEADS // joined, LENGTH, joined * DEPTH)
    np.testing.assert_array_equal(separate(rows, DEPTH), jnp.moveaxis(new, 2, 1))


@pytest.mark.parametrize("joined", [1, 2, 4])
def test_a_query_meets_its_own_head_only(joined):
    queries, new = draw(ROWS, HEADS, DEPTH, seed=1), draw(ROWS, LENGTH, KV_HEADS, DEPTH, seed=2)
    groups = HEADS // KV_HEADS
    by_head = queries.reshape(ROWS, KV_HEADS, groups, DEPTH)
    scores = jnp.einsum("rkgd,rckd->rkgc", by_head, new)
    output = jnp.einsum("rkgc,rckd->rkgd", scores, new).reshape(queries.shape)

    heads, width = KV_HEADS // joined, DEPTH * joined
    wide = join(new, width)
    asked = spread(queries, heads, width).reshape(ROWS, heads, -1, width)
    found = jnp.einsum("rjgw,rcjw->rjgc", asked, wide)
    np.testing.assert_allclose(found.reshape(scores.shape), scores, rtol=1e-6, atol=1e-6)
    found = jnp.einsum("rjgc,rcjw->rjgw", found, wide).reshape(ROWS, HEADS, width)
    np.testing.assert_allclose(narrow(found, heads, DEPTH), output, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "pages"])
def test_a_model_over_a_joined_cache_is_the_same_model(kind):
    model = DecoderConfig(vocab_size=16, hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=4)
    params = unstack_layers(init_params(jax.random.key(0), model), model.num_layers)
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 16)
    pages = None if kind == "rows" else jnp.asarray([[4, 1], [0, 3]])
    outputs = []
    for joined in (1, 2):
        config = dataclasses.replace(model, joined_heads=joined)
        cache = init_cache(config, 2, 8) if kind == "rows" else init_pool(config, 5, 4)
        assert cache[0][0].shape == (
            (2, 2 // joined, 8, 4 * joined) if kind == "rows" else (2 // joined, 5, 4, 4 * joined)
        )
        said = []
        for start, stop in ((0, 4), (4, 5), (5, 6)):
            positions = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
            hidden, cache = forward_cached(
                params, config, tokens[:, start:stop], positions, cache, pages=pages
            )
            said.append(hidden)
        outputs.append(jnp.concatenate(said, axis=1))
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("depth", [32, 64])
def test_a_step_over_joined_heads_is_one_for_the_kernels(depth):
    """Whatever the heads' own width; a cache that is not joined has kernels from 64 on."""
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 1, 8, depth), *[(2, 2, 128, 128)] * 2)
    ]
    traced = str(jax.make_jaxpr(cached_attention)(*arrays, jax.ShapeDtypeStruct((2, 1), jnp.int32)))
    assert "decode_attention" in traced


@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "tensor", "dtype", "platform", "joined"),
    [
        (64, 8, 1, "bfloat16", "tpu", 2),
        (64, 8, 4, "bfloat16", "tpu", 2),
        (64, 8, 8, "bfloat16", "tpu", 1),  # one head a device
        (64, 3, 1, "bfloat16", "tpu", 1),
        (128, 8, 1, "bfloat16", "tpu", 1),
        (32, 4, 1, "bfloat16", "tpu", 4),
        (96, 4, 1, "bfloat16", "tpu", 1),
        (64, 8, 1, "float32", "tpu", 1),
        (64, 8, 1, "bfloat16", "gpu", 1),
        (64, 8, 1, "bfloat16", "cpu", 1),
    ],
)
def test_an_engine_joins_heads_where_a_tpu_s_kernels_want_them(
    head_dim, kv_heads, tensor, dtype, platform, joined
):
    model = DecoderConfig(
        vocab_size=16, num_heads=24, num_kv_heads=kv_heads, head_dim=head_dim, dtype=jnp.dtype(dtype)
    )
    mesh = SimpleNamespace(shape={"tensor": tensor}, devices=np.array([SimpleNamespace(platform=platform)]))
    assert lay_out(model, mesh).joined_heads == joined
