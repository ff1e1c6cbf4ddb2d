"""Mixture of experts: against a loop over tokens and experts, on a mesh, quantized, cached."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from empg_jax.models.decoder import (
    DecoderConfig,
    forward,
    forward_cached,
    init_cache,
    init_params,
    unstack_layers,
)
from empg_jax.models.moe import ROUND, MoeConfig, mix_experts
from empg_jax.models.quantize import quantize_params
from empg_jax.parallel.layout import on_mesh
from empg_jax.parallel.mesh import make_mesh

MOE = MoeConfig(num_experts=6, top_k=2, expert_size=10)
MODEL = DecoderConfig(
    vocab_size=31,
    hidden_size=16,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    qkv_bias=False,
    qk_norm=True,
    moe=MOE,
)


def make_inputs(rows=2, length=4):
    generator = np.random.default_rng(0)
    shapes = [(rows, length, 16), (rows, length, 6), (6, 16, 10), (6, 16, 10), (6, 10, 16)]
    inputs = [(0.5 * generator.normal(size=shape)).astype(np.float32) for shape in shapes]
    inputs[1][..., 0] = -9  # an expert that nobody chooses
    inputs[1][0, :, 1] = 9  # and one that a whole row does
    return inputs


def mix_in_a_loop(hidden, logits, gate, up, down, config):
    mixed = np.zeros(hidden.shape)
    for place in np.ndindex(hidden.shape[:2]):
        shares = np.exp(logits[place].astype(float))
        shares /= shares.sum()
        chosen = np.argsort(-shares)[: config.top_k]
        whole = shares[chosen].sum() if config.is_normalized else 1.0
        for e in chosen:
            first = hidden[place] @ gate[e]
            inner = first / (1 + np.exp(-first)) * (hidden[place] @ up[e])
            mixed[place] += shares[e] / whole * (inner @ down[e])
    return mixed


@pytest.mark.parametrize("config", [MOE, MoeConfig(6, 3, 10, is_normalized=False), MoeConfig(6, 1, 10)])
def test_every_token_goes_through_its_experts(config):
    inputs = make_inputs()
    found = jax.jit(functools.partial(mix_experts, config=config))(*inputs)
    np.testing.assert_allclose(found, mix_in_a_loop(*inputs, config), atol=1e-5)


@pytest.mark.parametrize("mesh", [dict(fsdp=2, tensor=2), dict(tensor=3, sequence=2), dict(tensor=4)])
def test_on_a_mesh(mesh):
    """Two, three and (4 does not divide 6) no parts of the experts; values and gradients."""
    inputs = make_inputs()

    def loss(*inputs):
        mixed = mix_experts(*inputs, MOE)
        return jnp.sum(jnp.sin(mixed)), mixed

    slopes = jax.value_and_grad(loss, tuple(range(5)), has_aux=True)
    expected, grid = jax.jit(slopes)(*inputs), make_mesh(**mesh)
    found = jax.jit(on_mesh(grid, slopes))(*jax.device_put(inputs, NamedSharding(grid, PartitionSpec())))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-5), found, expected)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(expected[1]))


def as_on_a_tpu(patch):
    """Lets the experts' products be those of a TPU; a CPU computes them by multiplying every row with all."""
    patch.setattr(jax.lax, "platform_dependent", lambda *arrays, tpu, default: tpu(*arrays))


@pytest.mark.parametrize("mesh", [None, dict(tensor=2)])
@pytest.mark.parametrize(
    ("tokens", "block", "path"),
    [(1, 128, "rows"), (8, 128, "rounds"), (80, 8, "rounds"), (640, 128, "blocks"), (640, 8, "blocks")],
)
def test_products_off_a_tpu(monkeypatch, tokens, block, path, mesh):
    """Rows are multiplied one by one, in rounds or in blocks; groups have any size, and one has no row."""
    inputs, size = make_inputs(rows=min(4, tokens), length=-(-tokens // 4)), tokens * MOE.top_k
    most = {"rows": MOE.num_experts / 3, "rounds": ROUND * MOE.num_experts, "blocks": np.inf}
    assert next(name for name, limit in most.items() if size <= limit) == path
    monkeypatch.setattr("empg_jax.models.moe.BLOCK", block)
    grid = None if mesh is None else make_mesh(**mesh)
    if grid is not None:
        inputs = jax.device_put(inputs, NamedSharding(grid, PartitionSpec()))

    def lower():
        def slopes(*inputs):  # a function of its own each time, which is traced anew
            return jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(mix_experts(*x, MOE))), tuple(range(5)))(
                *inputs
            )

        return jax.jit(slopes if grid is None else on_mesh(grid, slopes)).lower(*inputs)

    with monkeypatch.context() as patch:
        as_on_a_tpu(patch)
        whole = lower()
    split = lower()
    held = 6 if grid is None else 3
    every = f"tensor<{held}x{size}x16xf32>"  # every row with every expert
    assert every in whole.as_text()
    assert every not in split.as_text() or path == "rounds"  # where a round has as many rows
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4),
        split.compile()(*inputs),
        whole.compile()(*inputs),
    )


def test_what_a_tpu_leaves_unwritten_reaches_no_gradient(monkeypatch):
    """Rows of other devices' experts lie behind the last group: a TPU's products have any number there."""
    inputs = make_inputs()
    slopes = jax.grad(lambda *inputs: jnp.sum(jnp.sin(mix_experts(*inputs, MOE))), tuple(range(5)))
    expected = jax.jit(slopes)(*inputs)
    as_on_a_tpu(monkeypatch)

    def spoiled(product):
        def multiply(rows, matrices, counts, *args, **options):
            found = product(rows, matrices, counts, *args, **options)
            if found.ndim == 3:  # one matrix per group
                return found
            return jnp.where((jnp.arange(len(found)) < counts.sum())[:, None], found, jnp.nan)

        return multiply

    for name in ("ragged_dot", "ragged_dot_general"):
        monkeypatch.setattr(jax.lax, name, spoiled(getattr(jax.lax, name)))
    mesh = make_mesh(tensor=2)
    found = jax.jit(on_mesh(mesh, slopes))(*jax.device_put(inputs, NamedSharding(mesh, PartitionSpec())))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-5), found, expected)


@pytest.mark.slow
def test_the_whole_model_cached_quantized_and_rematerialized():
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), MODEL)
    layers = params["layers"]
    assert layers["gate_experts"]["kernel"].shape == (1, 6, 16, 10)
    assert layers["router"]["kernel"].shape == (1, 16, 6) and "gate_proj" not in layers
    tokens = np.random.default_rng(1).integers(0, 31, (2, 6)).astype(np.int32)
    positions = np.broadcast_to(np.arange(6, dtype=np.int32), tokens.shape)
    run = jax.jit(forward, static_argnums=1)
    expected = run(params, MODEL, tokens, positions, np.ones_like(tokens))
    cache, found = init_cache(MODEL, 2, 8), []
    for span in (slice(0, 5), slice(5, 6)):
        hidden, cache = jax.jit(forward_cached, static_argnums=1)(
            unstack_layers(params, 1), MODEL, tokens[:, span], positions[:, span], cache
        )
        found.append(hidden)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=1e-5)
    quantized = quantize_params(params, "int8")
    assert quantized["layers"]["down_experts"]["kernel_int8"].dtype == jnp.int8
    rough = run(quantized, MODEL, tokens, positions, np.ones_like(tokens))
    assert 0 < np.abs(rough - expected).max() < 0.2

    def slopes(model):
        inputs = [jnp.asarray(x) for x in (tokens, positions, np.ones_like(tokens))]
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(forward(p, model, *inputs)))))(params)

    full, none = slopes(MODEL), slopes(dataclasses.replace(MODEL, remat="none"))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), full, none)


def test_a_choice_among_too_few_is_refused():
    with pytest.raises(ValueError, match="top_k=7 must lie between 1 and num_experts=6"):
        MoeConfig(6, 7, 10)
