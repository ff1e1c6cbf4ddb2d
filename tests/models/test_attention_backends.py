"""Every back end of packed attention against the plain reference; which one is chosen, and where it runs.

The Pallas kernels run in interpret mode on the CPU: the same kernel code, without the compiler behind it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from empg_jax.models.attention import (
    SAVED,
    cached_attention,
    is_fusible,
    packed_attention,
    prefill,
    ragged,
    reference_attention,
    splash,
    tiles,
    triton,
)
from empg_jax.models.attention.operands import Operands

BACKENDS = {
    "tiles": (functools.partial(tiles.forward, tile=128), functools.partial(tiles.backward, tile=128)),
    "triton": tuple(functools.partial(f, interpret=True) for f in (triton.forward, triton.backward)),
    "splash": tuple(functools.partial(f, interpret=True) for f in (splash.forward, splash.backward)),
}
KERNELS = {"cpu": None, "cuda": "xla.gpu.triton", "tpu": "tpu_custom_call"}


def make_inputs(length, heads=4, kv_heads=2, depth=64, dtype=jnp.float32, seed=0):
    """Queries, keys, values, segments (three and padding; one) and a slope that is zero on padding."""
    keys = jax.random.split(jax.random.key(seed), 4)
    sizes = (heads, kv_heads, kv_heads, heads)
    q, k, v, slope = (
        jax.random.normal(key, (2, length, n, depth), dtype) for key, n in zip(keys, sizes, strict=True)
    )
    cut, end = length // 3, length - length // 5
    first = np.ones(length, np.int32)
    first[cut : 2 * cut], first[2 * cut : end], first[end:] = 2, 3, 0
    segments = jnp.asarray(np.stack([first, np.ones(length, np.int32)]))
    return (q, k, v, segments), slope * (segments > 0)[:, :, None, None].astype(dtype)


@jax.jit
def exact(inputs, slope):
    """Output and slopes of the reference in float32 of the same numbers."""
    *arrays, segments = inputs
    wide = [x.astype(jnp.float32) for x in arrays]
    output, pull = jax.vjp(lambda q, k, v: reference_attention(q, k, v, segments), *wide)
    return output, *pull(slope.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def run(backend, inputs, slope):
    forward, backward = BACKENDS[backend]
    output, normalizer = forward(*inputs)
    return output, normalizer, *backward(Operands(*inputs), output, normalizer, slope)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "length, kv_heads, dtype, tolerance",
    [
        (128, 4, jnp.float32, 2e-5),
        (200, 2, jnp.float32, 2e-5),
        (200, 2, jnp.bfloat16, 0.06),
    ],
)
def test_a_back_end_equals_the_reference(backend, length, kv_heads, dtype, tolerance):
    inputs, slope = make_inputs(length, kv_heads=kv_heads, dtype=dtype)
    output, normalizer, *slopes = run(backend, inputs, slope)
    assert normalizer.dtype == jnp.float32
    seen = inputs[3] > 0  # padding attends to padding; nobody reads what comes out
    for found, expected in zip((output, *slopes), exact(inputs, slope), strict=True):
        assert found.dtype == dtype
        found = np.asarray(found.astype(jnp.float32))
        np.testing.assert_allclose(found[seen], np.asarray(expected)[seen], atol=tolerance)


@pytest.mark.parametrize("backend", ["triton", "splash"])
def test_the_normalizer_is_the_same_number_in_every_back_end(backend):
    """So that one back end's residuals are another's: the derivative stands outside of the choice."""
    inputs, slope = make_inputs(200)
    _, expected, *_ = run("tiles", inputs, slope)
    _, found, *_ = run(backend, inputs, slope)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "splash"])
def test_heads_of_128(backend):
    inputs, slope = make_inputs(130, heads=2, kv_heads=1, depth=128)
    output, _, *slopes = run(backend, inputs, slope)
    for found, expected in zip((output, *slopes), exact(inputs, slope), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    "length, head_dim, dtype, expected",
    [
        (128, 64, jnp.float32, True),
        (8192, 128, jnp.bfloat16, True),
        (200, 256, jnp.bfloat16, True),
        (127, 128, jnp.bfloat16, False),
        (1024, 16, jnp.float32, False),
        (1024, 96, jnp.bfloat16, False),
        (1024, 64, jnp.float16, False),
    ],
)
def test_what_the_kernels_take(length, head_dim, dtype, expected):
    assert is_fusible(length, head_dim, jnp.dtype(dtype)) is expected


def test_an_unknown_back_end_is_refused():
    inputs, _ = make_inputs(128)
    with pytest.raises(ValueError, match="'cudnn': choose one of auto, xla"):
        packed_attention(*inputs, backend="cudnn")


def loss(q, k, v, segments, backend="auto"):
    """Attention twice, as a model has it: scanned and rematerialized, its residuals kept by name."""

    def layer(q, _):
        return packed_attention(q, k, v, segments, backend=backend), None

    policy = jax.checkpoint_policies.save_only_these_names(SAVED)
    q, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy, prevent_cse=False), q, None, length=2)
    return jnp.sum(q.astype(jnp.float32) ** 2)


slopes_of = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnames="backend")


def lowered(platforms, inputs, **options):
    """The program for some platforms. Triton code is tied to this jaxlib, which export wants to be told."""
    checks = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    program = export.export(
        jax.jit(functools.partial(slopes_of, **options)), platforms=platforms, disabled_checks=checks
    )
    return program(*inputs).mlir_module()


@pytest.mark.parametrize("platform", KERNELS)
def test_each_platform_has_its_own_kernel(platform):
    inputs, _ = make_inputs(128)
    found = lowered([platform], inputs)
    for owner, kernel in KERNELS.items():
        if kernel is not None:
            assert (kernel in found) is (owner == platform)


@pytest.mark.parametrize("platform, kernel", [("cuda", "mha_forward"), ("tpu", "splash_mha_fwd")])
def test_the_forward_kernel_runs_once(platform, kernel):
    """Kept residuals serve the backward pass: rematerialization does not run the kernel again."""
    inputs, _ = make_inputs(128)
    assert lowered([platform], inputs).count(f'name = "{kernel}') == 1


@pytest.mark.parametrize(
    "shape, options",
    [
        ({"length": 128, "depth": 16}, {}),
        ({"length": 100}, {}),
        ({"length": 128}, {"backend": "xla"}),
    ],
)
def test_tiles_serve_what_the_kernels_refuse(shape, options):
    inputs, _ = make_inputs(**shape)
    found = lowered(["cuda", "tpu"], inputs, **options)
    assert not any(kernel in found for kernel in KERNELS.values() if kernel is not None)


def test_a_cpu_runs_the_same_program_with_and_without_kernels_in_view():
    inputs, _ = make_inputs(128)
    programs = [slopes_of.lower(*inputs, backend=b).compile() for b in ("auto", "xla")]
    sizes = [p.memory_analysis().temp_size_in_bytes for p in programs]
    assert sizes[0] == pytest.approx(sizes[1], abs=1024)
    for one, other in zip(*(p(*inputs) for p in programs), strict=True):
        np.testing.assert_array_equal(one, other)
    assert "conditional" not in programs[0].as_text()


def test_it_may_be_mapped_over_and_called_outside_of_a_program():
    inputs, _ = make_inputs(128)
    stacked = [jnp.stack([x, x[::-1]]) for x in inputs[:3]]
    once = packed_attention(*(x[1] for x in stacked), inputs[3])
    mapped = jax.jit(jax.vmap(packed_attention, in_axes=(0, 0, 0, None)))(*stacked, inputs[3])
    np.testing.assert_allclose(mapped[1], once, atol=1e-6)


def test_on_a_mesh_each_device_runs_the_kernel_on_its_own_rows_and_heads():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    inputs, _ = make_inputs(128)
    heads = jax.P("data", None, "tensor")
    split = jax.shard_map(
        packed_attention,
        mesh=mesh,
        in_specs=(heads, heads, heads, jax.P("data")),
        out_specs=heads,
        check_vma=False,
    )

    def total(q, k, v, segments):
        return jnp.sum(split(q, k, v, segments) ** 2)

    whole = jax.grad(lambda *x: jnp.sum(reference_attention(*x) ** 2), argnums=(0, 1, 2))
    slopes = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    for found, expected in zip(slopes(*inputs), jax.jit(whole)(*inputs), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    checks = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    for platform in ("cuda", "tpu"):
        program = export.export(slopes, platforms=[platform], disabled_checks=checks)(*inputs)
        assert KERNELS[platform] in program.mlir_module()


@pytest.mark.parametrize("rows, kv_heads, capacity", [(1, 2, 512), (3, 1, 256), (140, 2, 128)])
def test_ragged_decode_equals_products_over_the_whole_cache(rows, kv_heads, capacity):
    keys = jax.random.split(jax.random.key(1), 3)
    queries = jax.random.normal(keys[0], (rows, 4, 64))
    cache = [jax.random.normal(key, (rows, kv_heads, capacity, 64)) for key in keys[1:]]
    lengths = np.random.default_rng(0).integers(1, capacity + 1, rows).astype(np.int32)
    lengths[0] = capacity
    expected = cached_attention(queries[:, None], *cache, jnp.asarray(lengths)[:, None] - 1)[:, 0]
    unread = np.arange(capacity) >= lengths[:, None]  # junk beyond a row's end changes nothing
    cache = [jnp.where(unread[:, None, :, None], 1e30, x) for x in cache]
    (found,) = ragged.decode(queries, *cache, jnp.asarray(lengths), interpret=True)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_ragged_decode_of_an_idle_row_is_zero():
    queries, cache = jnp.ones((2, 4, 64)), jnp.ones((2, 2, 128, 64))
    (found,) = ragged.decode(queries, cache, cache, jnp.array([0, 128]), interpret=True)
    np.testing.assert_array_equal(found[0], 0)
    np.testing.assert_allclose(found[1], 1, rtol=1e-6)


@pytest.mark.parametrize("rows, blocks, expected", [(2, 16, 16), (32, 16, 8), (512, 16, 1), (1, 3, 3)])
def test_pieces_of_a_row_divide_its_blocks(rows, blocks, expected):
    assert ragged.count_splits(rows, blocks) == expected


@pytest.mark.parametrize(
    "length, heads, kv_heads, capacity, depth",
    [
        (32, 4, 2, 256, 128),
        (64, 6, 1, 1024, 128),
        (48, 7, 1, 384, 128),  # in three parts of 16 queries
        (32, 12, 2, 256, 64),  # four heads of 64, joined two by two
    ],
)
def test_the_prefill_kernel_equals_products_over_the_whole_cache(length, heads, kv_heads, capacity, depth):
    """Rows begin anywhere and end in pads; the last one has nothing but pads."""
    keys = jax.random.split(jax.random.key(0), 3)
    queries = jax.random.normal(keys[0], (3, length, heads, depth), jnp.bfloat16)
    cache = [jax.random.normal(key, (3, kv_heads, capacity, 128), jnp.bfloat16) for key in keys[1:]]
    start, count = np.array([[0], [capacity - length], [5]]), np.array([[length - 3], [length], [0]])
    offsets = np.arange(length)[None]
    positions = np.where(offsets < count, start + offsets, capacity).astype(np.int32)
    exact = [x.astype(jnp.float32) for x in (queries, *cache)]
    expected = cached_attention(*exact, jnp.asarray(positions))
    unread = np.arange(capacity) >= start + count  # junk behind a row's newest key changes nothing
    cache = [jnp.where(unread[:, None, :, None], jnp.bfloat16(1e30), x) for x in cache]
    assert prefill.takes(queries, cache[0])
    found = np.asarray(prefill.attend(queries, *cache, jnp.asarray(positions), interpret=True), np.float32)
    assert np.isfinite(found).all()
    is_real = offsets < count
    np.testing.assert_allclose(found[is_real], np.asarray(expected)[is_real], atol=0.02)
    error = np.abs(found - np.asarray(expected))[is_real].mean()
    assert error < 1e-3  # as bfloat16 rounds


@pytest.mark.parametrize(
    "length, depth, dtype, is_kernel",
    [
        (32, 128, "bfloat16", True),
        (32, 64, "bfloat16", False),
        (32, 128, "float32", False),
        (8, 128, "bfloat16", False),
    ],
)
def test_prefill_uses_the_kernel_on_tpus_only(length, depth, dtype, is_kernel):
    shapes = ((2, length, 4, depth), (2, 2, 256, depth), (2, 2, 256, depth))
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    positions = jax.ShapeDtypeStruct((2, length), jnp.int32)
    for platform in KERNELS:
        module = export.export(jax.jit(cached_attention), platforms=[platform])(*arrays, positions)
        is_there = KERNELS["tpu"] in module.mlir_module()
        assert is_there is (is_kernel and platform == "tpu")


@pytest.mark.parametrize(
    "depth, dtype, with_kernel",
    [
        (128, "bfloat16", {"cuda", "tpu"}),
        (64, "bfloat16", {"cuda"}),
        (128, "float32", {"cuda"}),  # the kernel for TPUs would round keys and values to bfloat16
    ],
)
def test_decode_uses_the_kernels_of_accelerators(depth, dtype, with_kernel):
    shapes = ((2, 1, 4, depth), (2, 2, 256, depth), (2, 2, 256, depth))
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    program = jax.jit(cached_attention)
    positions = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    for platform, kernel in KERNELS.items():
        checks = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
        exported = export.export(program, platforms=[platform], disabled_checks=checks)
        module = exported(*arrays, positions).mlir_module()
        assert (kernel is not None and kernel in module) is (platform in with_kernel)
