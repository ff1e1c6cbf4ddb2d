"""The learner's and the engine's programs lower for CPU, GPU and TPU alike, from shapes alone."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import export

from empg_jax.algorithms import make_algorithm
from empg_jax.engine.programs import Chunk, Request, compile_programs
from empg_jax.engine.sizes import EngineConfig
from empg_jax.learner.batching import BatchShape, make_batch
from empg_jax.learner.state import make_optimizer, state_shapes
from empg_jax.learner.update import make_learner
from empg_jax.models.decoder import DecoderConfig, init_cache, init_params
from empg_jax.parallel.mesh import make_mesh

PLATFORMS = ("cpu", "cuda", "tpu")
# Fused attention of each platform. Triton code is tied to the jaxlib that wrote it; export wants to be told.
KERNELS = {"cuda": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}
TIED = [export.DisabledSafetyCheck.custom_call(KERNELS["cuda"])]
MODELS = {
    "tiny": DecoderConfig(vocab_size=64),
    "qwen2.5-1.5b": DecoderConfig(
        vocab_size=151936,
        hidden_size=1536,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        intermediate_size=8960,
        rope_theta=1e6,
        dtype=jnp.bfloat16,
    ),
}


def shapes_of(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def outputs(exported):
    return jax.tree.unflatten(exported.out_tree, exported.out_avals)


def check_state(out, state):
    """What goes in comes out, shape by shape, so that it can be donated."""
    assert jax.tree.structure(out) == jax.tree.structure(state)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), out, state)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    "name, axes, is_fused",
    [
        ("tiny", {}, False),
        ("qwen2.5-1.5b", {}, True),
        ("qwen2.5-1.5b", {"data": 2, "tensor": 2}, True),
    ],
)
def test_the_update_lowers_for_every_platform(name, axes, is_fused):
    model = MODELS[name]
    optimizer, _ = make_optimizer(learning_rate=1e-6, final_learning_rate=1e-7, total_steps=100)
    algorithm = make_algorithm("grpo", modulation="aem", num_minibatches=2)
    learner = make_learner(model, algorithm, optimizer, make_mesh(**axes), micro_rows=2)
    shape = BatchShape(trajectories=8, turns=4, row_tokens=1024, micro_rows=2, max_rows=8, num_minibatches=2)
    batch = shapes_of(make_batch([], shape, seed=(0,))[0])
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state_shapes(model, optimizer),
        learner.shardings,
    )
    index = jax.ShapeDtypeStruct((), jnp.int32)
    scores = jax.eval_shape(learner.recorded_scores, batch)
    credit = jax.eval_shape(learner.credit, batch, scores)
    program = export.export(learner.update, platforms=PLATFORMS, disabled_checks=TIED)
    exported = program(state, batch, scores, credit, index, index)
    assert exported.platforms == PLATFORMS
    check_state(outputs(exported)[0], state)
    written = exported.mlir_module()
    assert all((f"@{kernel}" in written) is is_fused for kernel in KERNELS.values())


@pytest.fixture(scope="module", params=MODELS)
def engine(request):
    """Programs and the shapes of what they take: parameters and cache."""
    model = MODELS[request.param]
    config = EngineConfig(slots=8, max_tokens=1024, max_response_tokens=128, stop_ids=(1, 2))
    programs = compile_programs(model, config, make_mesh())
    stacked = jax.eval_shape(lambda: init_params(jax.random.key(0), model))
    params = jax.eval_shape(programs.unstack, stacked)
    return programs, params, jax.eval_shape(lambda: init_cache(model, config.slots, 512))


def integers(*shapes):
    return [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]


def test_decode_lowers_for_every_platform(engine):
    programs, params, cache = engine
    key = jax.eval_shape(lambda: jax.random.key(0))
    temperature = jax.ShapeDtypeStruct((8,), jnp.float32)
    exported = export.export(programs.decode, platforms=PLATFORMS, disabled_checks=TIED)(
        params, cache, Request(key, *integers((8, 8), (8, 4), (2,)), temperature)
    )
    assert exported.platforms == PLATFORMS
    check_state(outputs(exported)[0], cache)


@pytest.mark.parametrize("rows", [1, 8])
def test_prefill_lowers_for_every_platform(engine, rows):
    programs, params, cache = engine
    exported = export.export(programs.prefill, platforms=PLATFORMS)(
        params, cache, Chunk(*integers((rows,), (rows, 64), (rows, 2)))
    )
    assert exported.platforms == PLATFORMS
    check_state(outputs(exported), cache)


@pytest.mark.parametrize(
    "platform, pages, axes, part",
    [
        ("cuda", 0, {"tensor": 4}, "tensor<8x4x128x128xbf16>"),  # 8 slots with a head each, in four pieces
        ("cuda", 0, {"data": 2, "tensor": 2}, "tensor<8x4x128x128xbf16>"),  # 4 slots with two
        ("cuda", 16, {"tensor": 4}, "tensor<1x256x16x128xbf16>"),
        ("tpu", 0, {"tensor": 4}, "tensor<1x8x512x128xbf16>"),  # as pages: 8 slots, each a head of 512 keys
        ("tpu", 0, {"data": 2, "tensor": 2}, "tensor<1x8x512x128xbf16>"),
        ("tpu", 16, {"tensor": 4}, "tensor<1x256x16x128xbf16>"),
    ],
)
def test_a_decode_kernel_reads_only_what_its_device_holds(platform, pages, axes, part):
    """Else the compiler gathers the whole cache for every call, or cannot split the call at all."""
    model = dataclasses.replace(MODELS["tiny"], num_heads=8, head_dim=128, dtype=jnp.bfloat16)
    sizes = EngineConfig(slots=8, max_tokens=512, max_response_tokens=128, stop_ids=(1,), page_tokens=pages)
    programs = compile_programs(model, sizes, make_mesh(**axes))
    params = programs.unstack(init_params(jax.random.key(0), model))
    request = Request(
        jax.eval_shape(lambda: jax.random.key(0)),
        *integers((8, 8), (8, 4), (2,)),
        jax.ShapeDtypeStruct((8,), jnp.float32),
        pages=integers((8, 32))[0] if pages else None,
    )
    traced = programs.decode.trace(params, programs.new_cache(512), request)
    written = traced.lower(lowering_platforms=(platform,)).as_text()
    (call, *others) = (line for line in written.splitlines() if f"@{KERNELS[platform]}" in line)
    operands = call[call.rindex(" : (") :].split(" -> ")[0]
    assert operands.count(part) == 2 and not others  # keys and values


@pytest.mark.parametrize(
    "pages, axes, part",
    [
        (0, {"tensor": 4}, "tensor<8x1x512x128xbf16>"),
        (0, {"data": 2, "tensor": 2}, "tensor<4x2x512x128xbf16>"),
        (16, {"tensor": 4}, "tensor<8x1x512x128xbf16>"),
    ],
)
def test_a_prefill_kernel_reads_only_what_its_device_holds(pages, axes, part):
    model = dataclasses.replace(MODELS["tiny"], num_heads=8, head_dim=128, dtype=jnp.bfloat16)
    sizes = EngineConfig(slots=8, max_tokens=512, max_response_tokens=128, stop_ids=(1,), page_tokens=pages)
    programs = compile_programs(model, sizes, make_mesh(**axes))
    params = programs.unstack(init_params(jax.random.key(0), model))
    chunk = Chunk(*integers((8,), (8, 32), (8, 2)), pages=integers((8, 32))[0] if pages else None)
    traced = programs.prefill.trace(params, programs.new_cache(512), chunk)
    written = traced.lower(lowering_platforms=("tpu",)).as_text()
    (call, *others) = (line for line in written.splitlines() if f"@{KERNELS['tpu']}" in line)
    operands = call[call.rindex(" : (") :].split(" -> ")[0]
    assert operands.count(part) == 2 and not others  # keys and values
