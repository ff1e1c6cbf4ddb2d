"""Adapters: nothing at the start, the same folded in, and no copy of the base."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.models.decoder import (
    DecoderConfig,
    forward,
    forward_cached,
    init_cache,
    init_params,
    param_axes,
    unstack_layers,
)
from empg_jax.models.lora import LoraConfig, combine, find_targets, make_lora, merge
from empg_jax.models.quantize import quantize_module, quantize_params

LORA = LoraConfig(rank=4, alpha=8.0)
CONFIG = DecoderConfig(vocab_size=40, hidden_size=64, intermediate_size=96, num_kv_heads=2, lora=LORA)


TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, CONFIG.vocab_size)
POSITIONS = jnp.broadcast_to(jnp.arange(9)[None], TOKENS.shape)
run = jax.jit(forward, static_argnums=1)


def hidden(params, config=CONFIG):
    return np.asarray(run(params, config, TOKENS, POSITIONS, jnp.ones_like(TOKENS)))


@pytest.fixture(scope="module")
def base():
    return init_params(jax.random.key(0), CONFIG)


def trained(base, config=LORA, seed=5):
    """Adapters whose B is not zero."""
    generator = np.random.default_rng(seed)
    fresh = make_lora(jax.random.key(2), base, config)
    return jax.tree.map(lambda leaf: jnp.asarray(0.1 * generator.normal(size=leaf.shape), leaf.dtype), fresh)


def test_fresh_adapters_change_nothing(base):
    adapters = make_lora(jax.random.key(2), base, LORA)
    np.testing.assert_array_equal(hidden(combine(base, adapters)), hidden(base))
    assert np.abs(hidden(combine(base, trained(base))) - hidden(base)).max() > 0.1


def test_the_product_is_that_of_the_definition():
    """One layer by hand: x W + (alpha / r) (x A) B + bias."""
    from empg_jax.models.projection import Linear

    generator = np.random.default_rng(0)
    shapes = {"kernel": (6, 3), "bias": (3,), "lora_a": (6, 2), "lora_b": (2, 3)}
    leaves = {name: jnp.asarray(generator.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.asarray(generator.normal(size=(5, 6)), jnp.float32)
    layer = Linear(3, jnp.float32, jnp.float32, jax.nn.initializers.zeros, lora_scale=2.5)
    found = layer.apply({"params": leaves}, x)
    w, b, down, up, x = (np.asarray(leaf, np.float64) for leaf in (*leaves.values(), x))
    np.testing.assert_allclose(found, x @ w + 2.5 * (x @ down) @ up + b, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["none", "int8", "nf4"])
def test_merged_equals_unmerged(base, scheme):
    base = quantize_params(base, scheme)
    adapters = trained(base)
    merged = merge(base, adapters, LORA.scale)
    plain = jax.eval_shape(lambda: init_params(jax.random.key(0), CONFIG))
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, plain)
    np.testing.assert_allclose(hidden(merged), hidden(combine(base, adapters)), atol=2e-5)


def test_merging_in_another_type(base):
    merged = merge(base, trained(base), LORA.scale, jnp.bfloat16)
    assert merged["layers"]["q_proj"]["kernel"].dtype == jnp.bfloat16
    assert merged["layers"]["q_proj"]["bias"] is base["layers"]["q_proj"]["bias"]


def test_quantized_experts_become_plain_matrices_too():
    """They are not adapted, but whoever loads the merged model knows no codes."""
    kernel = jax.random.normal(jax.random.key(0), (2, 3, 8, 4))
    held = {"layers": {"up_experts": quantize_module({"kernel": kernel}, "int8")}}
    found = merge(held, {"layers": {}}, 1.0, jnp.float32)["layers"]["up_experts"]
    assert found.keys() == {"kernel"}
    np.testing.assert_allclose(found["kernel"], kernel, atol=float(jnp.abs(kernel).max()) / 254 * 1.01)


def test_combining_copies_nothing_and_takes_nothing_over(base):
    adapters = trained(base)
    both = combine(base, adapters)
    for tree in (base, adapters):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            node = both
            for key in path:
                node = node[key.key]
            assert node is leaf
    assert combine({}, base) == base and combine(base, {}) == base
    with pytest.raises(ValueError, match="already has lora_a, lora_b"):
        combine(both, adapters)


def test_decoding_with_adapters_equals_the_full_forward(base):
    """Unstacked layers are combined layer by layer."""
    adapters = trained(base)
    unstacked = combine(*(unstack_layers(tree, CONFIG.num_layers) for tree in (base, adapters)))
    cache = init_cache(CONFIG, slots=2, capacity=9)
    found, _ = jax.jit(forward_cached, static_argnums=1)(unstacked, CONFIG, TOKENS, POSITIONS, cache)
    np.testing.assert_allclose(found, hidden(combine(base, adapters)), atol=1e-5)


def test_targets_are_patterns_over_module_names(base):
    def names(*patterns):
        return sorted(path[-1] for path in find_targets(base, patterns))

    assert names("q_proj", "v_*") == ["q_proj", "v_proj"]
    assert len(names("*")) == 7  # norms are no linear layers
    adapters = make_lora(jax.random.key(0), base, LoraConfig(2, targets=("down_proj",)))
    assert jax.tree.map(jnp.shape, adapters) == {
        "layers": {"down_proj": {"lora_a": (2, 96, 2), "lora_b": (2, 2, 64)}}
    }
    with pytest.raises(
        ValueError, match=r"LoRA target w_proj, qproj fits no linear layer; .* down_proj, gate"
    ):
        find_targets(base, ("w_proj", "q_proj", "qproj"))
    with pytest.raises(ValueError, match="LoRA needs rank >= 1"):
        LoraConfig(rank=0)


def test_axes_follow_the_matrix(base):
    axes = param_axes({"layers": trained(base)["layers"]})["layers"]
    matrices = param_axes(base)["layers"]
    for name, module in axes.items():
        layers, depth, width = matrices[name]["kernel"]
        assert module == {"lora_a": (layers, depth, None), "lora_b": (layers, None, width)}
    for scheme in ("int8", "nf4"):
        quantized = param_axes(quantize_params(base, scheme))["layers"]
        assert quantized["up_proj"][f"kernel_{scheme}"] == matrices["up_proj"]["kernel"]


@pytest.mark.parametrize("scheme", ["none", "int8", "nf4"])
def test_only_adapters_get_a_gradient_and_the_base_may_be_bfloat16(scheme):
    config = dataclasses.replace(CONFIG, param_dtype=jnp.bfloat16)
    base = quantize_params(init_params(jax.random.key(0), config), scheme)
    adapters = trained(base)

    def loss(adapters, base):
        states = forward(combine(base, adapters), config, TOKENS, POSITIONS, jnp.ones_like(TOKENS))
        return jnp.sum(states[..., 0])

    gradients = jax.jit(jax.grad(loss))(adapters, base)
    assert jax.tree.structure(gradients) == jax.tree.structure(adapters)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert leaf.dtype == jnp.float32 and np.abs(leaf).max() > 0, path
