"""Attention over pages: the kernels of accelerators give the numbers of the rows that a gather makes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from empg_jax.engine.engine import EngineConfig
from empg_jax.engine.programs import Request, compile_programs
from empg_jax.models.attention import cached, paged, tpu
from empg_jax.models.attention.cached import cached_attention
from empg_jax.models.decoder import DecoderConfig, init_params, init_pool
from empg_jax.parallel.mesh import make_mesh
from tests.engine.test_export import KERNELS, PLATFORMS, TIED, integers

ROWS, HEADS, KV_HEADS, DEPTH, SIZE, COLUMNS, PAGES = 3, 4, 2, 64, 16, 6, 12


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.fixture(scope="module")
def pool():
    """Keys, values, and the pages of each row: the second row shares its first two with the first one."""
    keys, values = (draw(KV_HEADS, PAGES, SIZE, DEPTH, seed=seed) for seed in (1, 2))
    pages = np.array([[3, 7, 1, 0, 0, 0], [3, 7, 11, 2, 5, 8], [9, 4, 0, 0, 0, 0]], np.int32)
    return keys, values, jnp.asarray(pages)


def test_new_tokens_go_to_their_pages_and_pads_nowhere(pool):
    keys, values, pages = pool
    new = draw(ROWS, 2, KV_HEADS, DEPTH, seed=3)
    positions = jnp.asarray([[15, 16], [95, 96], [96, 96]], jnp.int32)
    written = np.asarray(paged.write_pages(keys, new, pages, positions))
    expected = np.asarray(keys).copy()
    expected[:, 3, 15], expected[:, 7, 0], expected[:, 8, 15] = new[0, 0], new[0, 1], new[1, 0]
    np.testing.assert_array_equal(written, expected)
    del values


def test_a_gathered_row_is_its_pages_in_their_order(pool):
    keys, _, pages = pool
    rows = paged.gather_pages(keys, pages)
    assert rows.shape == (ROWS, KV_HEADS, COLUMNS * SIZE, DEPTH)
    np.testing.assert_array_equal(rows[1, :, 2 * SIZE + 3], keys[:, 11, 3])


def test_the_gpu_kernel_gives_the_same_as_gathered_rows(pool):
    keys, values, pages = pool
    queries, lengths = draw(ROWS, HEADS, DEPTH, seed=4), jnp.asarray([33, 60, 0], jnp.int32)
    (found,) = paged.decode_gpu(queries, keys, values, pages, lengths, interpret=True)
    (expected,) = paged.gather_decode(queries, keys, values, pages, lengths)
    np.testing.assert_allclose(found[:2], expected[:2], atol=2e-6)
    assert not np.asarray(found[2]).any()  # an idle row


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "depth", "groups"),
    [
        ("rows", 128, 2),
        pytest.param("rows", 64, 2, marks=pytest.mark.long),
        pytest.param("pages", 128, 8, marks=pytest.mark.long),
        ("pages", 64, 2),
    ],
)
def test_the_tpu_kernel_gives_the_same_as_all_rows(kind, depth, groups, monkeypatch):
    """Three rows, the last one idle; ends inside of a block, and behind several. Heads of 64 are joined.

    The kernel adds up in the type of its queries where their number is a multiple of 8. The table of pages is
    larger than a core has room for, and no multiple of what is read at once.
    """
    from jax.experimental.pallas import tpu as pltpu

    rows, columns, size, width = 3, 126, 16, 128
    shape = (rows, KV_HEADS, 2048, width) if kind == "rows" else (KV_HEADS, 512, size, width)
    keys, values = (draw(*shape, seed=seed).astype(jnp.bfloat16) for seed in (1, 2))
    queries = draw(rows, groups * KV_HEADS * width // depth, depth, seed=4).astype(jnp.bfloat16)
    lengths = jnp.asarray([1037, 60, 0], jnp.int32)
    monkeypatch.setattr(tpu, "SCALARS", 256)  # of a table: two rows of 128 pages
    exact = [x.astype(jnp.float32) for x in (queries, keys, values)]
    with pltpu.force_tpu_interpret_mode():
        if kind == "rows":
            found = tpu.decode_rows(queries, keys, values, lengths)
            (expected,) = cached._dense_decode(*exact, lengths)
        else:
            pages = jax.random.permutation(jax.random.key(5), 512)[: rows * columns].reshape(rows, columns)
            pages = pages.astype(jnp.int32)
            found = tpu.decode_pages(queries, keys, values, pages, lengths)
            (expected,) = paged.gather_decode(*exact, pages, lengths)
    assert found.dtype == jnp.bfloat16 and np.isfinite(np.asarray(found, np.float32)).all()
    found, expected = (np.asarray(x[:2], np.float32) for x in (found, expected))
    np.testing.assert_allclose(found, expected, atol=6e-3)
    assert np.sqrt(np.mean((found - expected) ** 2)) < 2.5e-3  # as bfloat16 rounds


@pytest.mark.parametrize(
    ("columns", "size", "padded", "at_once"),
    [(64, 16, 64, 32), (63, 16, 64, 32), (94, 16, 96, 32), (5, 16, 8, 8), (3, 512, 3, 1), (100, 24, 112, 16)],
)
def test_a_tpu_reads_whole_blocks_of_pages(columns, size, padded, at_once):
    table, found = tpu.pad_table(jnp.ones((2, columns), jnp.int32), size)
    assert (table.shape, found) == ((2, padded), at_once)
    assert int(table.sum()) == 2 * columns


@pytest.mark.parametrize("length", [1, 5])
def test_a_tpu_writes_where_others_do(pool, length):
    """With its own index, which keeps the cache as it lies: rows and pages, pads and rows beyond included."""
    depth, pages = tpu.LANES, pool[2]
    keys = draw(KV_HEADS, PAGES, SIZE, depth, seed=1)
    new = draw(ROWS, length, KV_HEADS, depth, seed=3)
    positions = jnp.asarray([[0], [COLUMNS * SIZE - 3], [17]]) + jnp.arange(length)[None]
    positions = positions.at[2, length // 2 :].set(COLUMNS * SIZE)
    column = jnp.minimum(positions // SIZE, COLUMNS - 1)
    page = jnp.take_along_axis(pages, column, axis=1)
    page = jnp.where(positions < COLUMNS * SIZE, page, PAGES)
    found, expected = (
        write(keys, new, page, positions % SIZE) for write in (paged._write_flat, paged._write)
    )
    np.testing.assert_array_equal(found, expected)
    rows = draw(4, KV_HEADS, COLUMNS * SIZE, depth, seed=6)
    found, expected = (
        write(rows, new, jnp.asarray([2, 0, 4]), positions) for write in (cached._write_flat, cached._write)
    )
    np.testing.assert_array_equal(found, expected)
    assert (found[2, :, 0] == new[0, 0]).all()


def test_decode_without_a_kernel_is_the_attention_over_rows(pool):
    keys, values, pages = pool
    queries, positions = draw(ROWS, 1, HEADS, DEPTH, seed=4), jnp.asarray([[32], [59], [96]], jnp.int32)
    new = tuple(draw(ROWS, 1, KV_HEADS, DEPTH, seed=seed) for seed in (5, 6))
    found, (keys, values) = paged.attend_pages(queries, new, (keys, values), pages, positions)
    rows = paged.gather_pages(keys, pages), paged.gather_pages(values, pages)
    np.testing.assert_array_equal(found[:2], cached_attention(queries, *rows, positions)[:2])


@pytest.mark.parametrize(
    ("columns", "size", "keys", "count"),
    [
        (64, 16, 128, 8),
        (6, 16, 128, 2),
        (5, 16, 128, 1),
        (8, 128, 128, 1),
        (64, 16, 512, 32),
        (4, 256, 128, 1),
    ],
)
def test_a_kernel_reads_pages_that_divide_a_row(columns, size, keys, count):
    assert paged.count_pages(columns, size, keys) == count


@pytest.mark.parametrize(
    ("depth", "dtype", "size", "keys"),
    [
        (64, "float32", 16, 128),
        (128, "float32", 16, 64),
        (256, "float32", 16, 32),
        (256, "float32", 64, None),
        (128, "bfloat16", 16, 128),
        (128, "bfloat16", 128, 128),
    ],
)
def test_what_a_gpu_reads_at_a_time_fits_into_its_shared_memory(monkeypatch, depth, dtype, size, keys):
    """An H100 refused 128 float32 keys of 128 numbers: 264 KiB of its 227. Larger pages are gathered."""
    from jax.experimental.pallas.ops.gpu import paged_attention as kernels

    asked = []

    def kernel(queries, *_, pages_per_compute_block, **__):
        asked.append(pages_per_compute_block * size)
        return queries

    monkeypatch.setattr(kernels, "paged_attention", kernel)
    queries, pages = jnp.zeros((1, 4, depth), dtype), jnp.zeros((1, 64), jnp.int32)
    pool = jnp.zeros((2, 1, size, depth), dtype)
    (found,) = paged.decode_gpu(queries, pool, pool, pages, jnp.ones(1, jnp.int32))
    assert found.shape == queries.shape and asked == ([] if keys is None else [keys])


def test_decode_over_pages_lowers_for_every_platform():
    """The kernels are in it where they take the shapes."""
    model = DecoderConfig(
        vocab_size=64, hidden_size=128, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=128,
        intermediate_size=64, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16,
    )  # fmt: skip
    config = EngineConfig(8, 1024, 128, stop_ids=(1, 2), page_tokens=16)
    programs = compile_programs(model, config, make_mesh())
    stacked = jax.eval_shape(functools.partial(init_params, config=model), jax.random.key(0))
    params = jax.eval_shape(programs.unstack, stacked)
    pool = jax.eval_shape(lambda: init_pool(model, config.num_pages, 16))
    request = Request(
        jax.eval_shape(lambda: jax.random.key(0)),
        *integers((8, 8), (8, 4), (2,)),
        jax.ShapeDtypeStruct((8,), jnp.float32),
        pages=integers((8, 32))[0],
    )
    exported = export.export(programs.decode, platforms=PLATFORMS, disabled_checks=TIED)(
        params, pool, request
    )
    assert exported.platforms == PLATFORMS
    assert all(f"@{kernel}" in exported.mlir_module() for kernel in KERNELS.values())
