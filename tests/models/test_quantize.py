"""Quantized matrices: how far they are from the original, and that the layer multiplies with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.models.decoder import DecoderConfig, forward, init_params
from empg_jax.models.quantize import (
    SCHEMES,
    dequantize_module,
    matrix_shape,
    normal_float_table,
    quantize_module,
    quantize_params,
)

CONFIG = DecoderConfig(vocab_size=40, hidden_size=64, intermediate_size=96, num_kv_heads=2)


def random_kernel(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def round_trip(kernel, scheme):
    return dequantize_module(quantize_module({"kernel": kernel}, scheme), jnp.float32)


def test_the_table_is_that_of_the_normal_distribution():
    """Levels rise, contain -1, 0 and 1, and are spaced so that a normal number falls on each alike."""
    table = np.asarray(normal_float_table())
    assert len(table) == 16 and np.all(np.diff(table) > 0)
    assert (table[0], table[7], table[15]) == (-1.0, 0.0, 1.0)
    # Two of the published values (QLoRA, appendix E).
    np.testing.assert_allclose(table[[1, 8]], [-0.6961928009986877, 0.07958029955625534], atol=1e-6)
    largest = 1.8481308  # the normal quantile of the outermost probability
    borders = (table[1:] + table[:-1]) / 2 * largest
    samples = np.random.default_rng(0).normal(size=200_000)
    share = np.histogram(samples, [-np.inf, *borders, np.inf])[0] / len(samples)
    assert share[1:-1].max() < 0.08 and share[1:-1].min() > 0.04


def test_int8_is_within_half_a_step_of_each_column():
    kernel = random_kernel(48, 5) * jnp.asarray([[1e-6, 1.0, 3.0, 1e3, 0.0]])
    step = jnp.max(jnp.abs(kernel), axis=0, keepdims=True) / 127
    assert jnp.all(jnp.abs(round_trip(kernel, "int8") - kernel) <= step * 0.5001)
    assert not np.any(round_trip(kernel, "int8")[:, 4])  # a column of zeros stays one


def test_nf4_takes_the_nearest_level_of_its_block():
    """Blocks of 64 along the input axis, so the second block's scale does not depend on the first."""
    kernel = random_kernel(128, 3).at[64:].multiply(100.0)
    found = np.asarray(round_trip(kernel, "nf4"))
    table = np.asarray(normal_float_table(), np.float32)
    for block in (slice(0, 64), slice(64, 128)):
        part = np.asarray(kernel)[block]
        scale = np.abs(part).max(0)
        nearest = np.abs((part / scale)[..., None] - table).argmin(-1)
        np.testing.assert_allclose(found[block], table[nearest] * scale, rtol=1e-6)


@pytest.mark.parametrize(("scheme", "error"), [("int8", 0.01), ("nf4", 0.1)])
def test_relative_error_of_normal_matrices(scheme, error):
    kernel = random_kernel(256, 64)
    difference = round_trip(kernel, scheme) - kernel
    assert error / 2 < float(jnp.linalg.norm(difference) / jnp.linalg.norm(kernel)) < error


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_and_shapes(scheme):
    kernel = random_kernel(3, 128, 64)
    module = quantize_module({"kernel": kernel, "bias": jnp.zeros((3, 64))}, scheme)
    assert matrix_shape(module) == (3, 128, 64) and "kernel" not in module
    bits = sum(leaf.nbytes for name, leaf in module.items() if name != "bias") * 8 / kernel.size
    assert bits < {"int8": 8.3, "nf4": 4.6}[scheme]
    assert quantize_module({"scale": kernel}, scheme) == {"scale": kernel}


def test_an_odd_input_axis_cannot_be_packed():
    with pytest.raises(ValueError, match="packs pairs along the input axis, which is 7: use int8"):
        quantize_module({"kernel": random_kernel(7, 4)}, "nf4")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_decoder_computes_with_them(scheme, dtype):
    """The same as with the matrices that the codes stand for."""
    config = DecoderConfig(**{**vars(CONFIG), "dtype": dtype})
    params = init_params(jax.random.key(0), config)
    quantized = quantize_params(params, scheme)
    restored = jax.tree.map(lambda leaf: leaf, params)
    for name, module in quantized["layers"].items():
        if matrix_shape(module) is not None:
            layers = [dequantize_module(jax.tree.map(lambda x, i=i: x[i], module), dtype) for i in range(2)]
            restored["layers"][name] = {**params["layers"][name], "kernel": jnp.stack(layers)}
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 40)
    rows = tokens, jnp.broadcast_to(jnp.arange(9)[None], (2, 9)), jnp.ones_like(tokens)
    run = jax.jit(forward, static_argnums=1)
    found, expected, plain = (run(p, config, *rows) for p in (quantized, restored, params))
    tolerance = 1e-5 if dtype == jnp.float32 else 0.1
    np.testing.assert_allclose(np.float32(found), np.float32(expected), atol=tolerance)
    assert np.abs(np.float32(found) - np.float32(plain)).max() > 1e-3  # they really are quantized


def test_a_router_is_kept_as_it_is():
    """Its choices would change, it is small, and adapters are exported for a base with a router as it was."""
    layers = {"router": {"kernel": random_kernel(2, 64, 4)}, "up": {"kernel": random_kernel(2, 64, 4)}}
    for scheme in ("int8", "nf4"):
        found = quantize_params({"layers": layers}, scheme)["layers"]
        assert found["router"] == layers["router"] and "kernel" not in found["up"]
