"""Gradients are computed and added up over devices in the type that the configuration names."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.config import load_config
from empg_jax.models.axes import param_shardings
from empg_jax.models.decoder import DecoderConfig, forward, init_params
from empg_jax.models.lora import LoraConfig, combine, make_lora
from empg_jax.models.moe import MoeConfig
from empg_jax.parallel.layout import on_mesh
from empg_jax.parallel.mesh import make_mesh
from empg_jax.run.assembly import (
    make_language,
    make_model,
)

MODEL = DecoderConfig(vocab_size=32, hidden_size=16, num_heads=2, num_kv_heads=2, head_dim=8, num_layers=1)


NAMES = {"f32": "float32", "bf16": "bfloat16"}


def gradient_lines(model, mesh):
    """Lines of the gradient's program, each with the type and shape of its result."""

    def make():
        params = init_params(jax.random.key(0), model)
        if model.lora is None:
            return params
        return combine(params, make_lora(jax.random.key(0), params, model.lora))

    params = jax.eval_shape(make)
    rows = jax.ShapeDtypeStruct((4, 8), jnp.int32)

    def loss(params, tokens):
        return jnp.sum(forward(params, model, tokens, tokens, tokens).astype(jnp.float32))

    text = str(jax.make_jaxpr(on_mesh(mesh, jax.grad(loss)))(params, rows))
    return [line.strip() for line in text.splitlines() if " = " in line]


def types_of(lines, operation, shape):
    """Types of the results of this shape that an operation makes."""
    wanted = f"[{','.join(map(str, shape))}] = {operation}"
    return {NAMES[line.split(":")[1].split("[")[0]] for line in lines if wanted in line}


def kernel_products(model, mesh):
    """Types of the products that are the gradients of the down projection, ``[intermediate, hidden]``."""
    shape = (model.intermediate_size, model.hidden_size)
    return types_of(gradient_lines(model, mesh), "dot_general", shape)


@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16"])
def test_the_key_decides(reduce_dtype):
    config = load_config("quickstart", ["model.dtype=bfloat16", f"model.reduce_dtype={reduce_dtype}"])
    model = make_model(config, make_language(config).tokenizer)
    model = dataclasses.replace(model, num_layers=1, remat="none", scan_layers=False)
    assert kernel_products(model, make_mesh(fsdp=4)) == {reduce_dtype}


@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16"])
def test_the_key_decides_for_adapters_and_experts_not_for_biases(reduce_dtype):
    config = load_config("quickstart", ["model.dtype=bfloat16", f"model.reduce_dtype={reduce_dtype}"])
    model = make_model(config, make_language(config).tokenizer)
    model = dataclasses.replace(
        model, num_layers=1, remat="none", scan_layers=False, qkv_bias=True, head_dim=24
    )
    model = dataclasses.replace(model, moe=MoeConfig(4, 2, 40), lora=LoraConfig(rank=3))
    lines = gradient_lines(model, make_mesh(fsdp=4))
    biases = types_of(lines, "reduce_sum[axes=(0, 1)", (model.num_heads * model.head_dim,))
    assert biases == {"float32"}  # as small as they are
    assert types_of(lines, "dot_general", (model.hidden_size, 3)) == {reduce_dtype}
    for shape in ((4, model.hidden_size, 40), (4, 40, model.hidden_size)):
        assert types_of(lines, "ragged_dot_general", shape) == {reduce_dtype}
        assert types_of(lines, "psum", shape) == {reduce_dtype}  # over the devices


def test_one_device_keeps_the_precision_of_the_parameters():
    model = dataclasses.replace(MODEL, dtype=jnp.bfloat16, remat="none", scan_layers=False)
    assert kernel_products(model, make_mesh()) == {"float32"}


@pytest.mark.slow
def test_weights_are_sent_in_the_type_of_the_computation():
    """The result has the rounding of the narrow type; its gradient has not."""
    model = dataclasses.replace(MODEL, dtype=jnp.bfloat16)
    params = init_params(jax.random.key(0), model)
    tokens = jnp.arange(32, dtype=jnp.int32).reshape(4, 8) % 8
    ones = jnp.ones_like(tokens)

    def loss(params):
        return jnp.sum(jnp.sin(forward(params, model, tokens, tokens, ones).astype(jnp.float32)))

    alone = jax.jit(jax.value_and_grad(loss))(params)
    mesh = make_mesh(fsdp=2, sequence=2)
    placed = jax.device_put(params, param_shardings(mesh, params, model.head_dim))
    split = jax.jit(on_mesh(mesh, jax.value_and_grad(loss)))(placed)
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(one, other, atol=0.05 * np.abs(one).max())
