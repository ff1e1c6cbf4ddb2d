"""Products of a few rows with a large matrix, and the engine's transposed kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.models.decoder import DecoderConfig, forward_cached, init_cache, init_params, unstack_layers
from empg_jax.models.lora import LoraConfig, combine, make_lora
from empg_jax.models.products import multiply_transposed
from empg_jax.models.projection import transpose_kernels

SHAPE = dict(vocab_size=31, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4)
MODEL = DecoderConfig(**SHAPE, intermediate_size=24, qkv_bias=True)


def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), dtype)


@pytest.mark.parametrize("rows", [1, 5, 64, 65, 200])
@pytest.mark.parametrize("batch", [(), (3, 2)])
def test_a_product_is_the_same_whatever_the_number_of_rows(batch, rows):
    few, matrix = draw(*batch, rows, 24), draw(*batch, 40, 24)
    found = jax.jit(multiply_transposed)(few, matrix)
    np.testing.assert_allclose(found, np.asarray(few) @ np.swapaxes(matrix, -1, -2), atol=1e-4)


def test_a_product_has_the_type_that_is_asked_for():
    few, matrix = draw(4, 24, dtype=jnp.bfloat16), draw(40, 24, dtype=jnp.bfloat16)
    assert multiply_transposed(few, matrix).dtype == jnp.bfloat16
    exact = multiply_transposed(few, matrix, jnp.float32)
    expected = np.asarray(few, np.float64) @ np.asarray(matrix, np.float64).T
    np.testing.assert_allclose(exact, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("few", "first"), [(64, "f32[1024,16]"), (8, "f32[16,1024]")])
def test_few_rows_are_the_second_operand_on_a_cpu(few, first):
    rows, matrix = jnp.zeros((16, 256)), jnp.zeros((1024, 256))
    compiled = jax.jit(lambda rows, matrix: multiply_transposed(rows, matrix, few=few)).lower(rows, matrix)
    products = [line for line in compiled.compile().as_text().splitlines() if " dot(" in line]
    assert len(products) == 1 and f"= {first}" in products[0]


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_transposed_kernels_change_nothing(lora):
    model, params = dataclasses.replace(MODEL, lora=lora), init_params(jax.random.key(0), MODEL)
    if lora is not None:
        adapters = jax.tree.map(lambda leaf: leaf + 0.1, make_lora(jax.random.key(1), params, lora))
        params = combine(params, adapters)
    params = unstack_layers(params, model.num_layers)
    layers = tuple(map(transpose_kernels, params["layers"]))
    assert layers[0]["up_proj"]["kernel_t"].shape == (24, 16) and "kernel" not in layers[0]["up_proj"]
    assert layers[0]["input_norm"] is params["layers"][0]["input_norm"]
    tokens, positions = jnp.arange(10).reshape(2, 5), jnp.tile(jnp.arange(5), (2, 1))
    expected, cache = forward_cached(params, model, tokens, positions, init_cache(model, 2, 8))
    found, filled = forward_cached(
        {**params, "layers": layers}, model, tokens, positions, init_cache(model, 2, 8)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for a, b in zip(jax.tree.leaves(filled), jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
