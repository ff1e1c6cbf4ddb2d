"""Attention over keys and values in pages of a pool, and the writing of new ones.

A row's keys are scattered over the pages that its row of the table names, in their order. A decode step reads
them there: by JAX's Pallas kernels on GPUs (``pallas.ops.gpu.paged_attention``) and TPUs
(``pallas.ops.tpu.paged_attention``), where these take the shapes. All else gathers them into rows first, and
is then the attention of `cached`, with its numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from empg_jax.models.attention import tpu
from empg_jax.models.attention.cached import attend, cached_attention
from empg_jax.models.attention.dispatch import by_platform
from empg_jax.models.attention.joined import join
from empg_jax.models.attention.operands import scale
from empg_jax.models.attention.ragged import count_splits

# Most keys that a kernel program of a GPU reads at a time.
BLOCK = 128
# Most bytes of them: they and their values are twice in shared memory, of which an H100 has 227 KiB.
BLOCK_BYTES = 2**15


def attend_pages(
    queries: Float[Array, "R T H d"],
    new: tuple[Float[Array, "R T K d"], Float[Array, "R T K d"]],
    pool: tuple[Float[Array, "J N P w"], Float[Array, "J N P w"]],
    pages: Int[Array, "R C"],
    positions: Int[Array, "R T"],
) -> tuple[Float[Array, "R T H d"], tuple[Array, Array]]:
    """Write keys and values of new tokens into pages, and compute the tokens' attention over them.

    Args:
      queries: rotated queries of the new tokens.
      new: their keys and values.
      pool: all pages of keys, and of values; heads may be `joined`.
      pages: the pages of each row, in the order of their positions; what is behind a row's own is not read.
      positions: as in `cached_attention`. What has a position beyond the table's pages is not written.

    Returns:
      The attention output, in the type of the queries, and the pool.
    """
    size, capacity = pool[0].shape[2], pool[0].shape[2] * pages.shape[1]
    keys, values = (
        write_pages(old, join(x, old.shape[3]), pages, positions) for old, x in zip(pool, new, strict=True)
    )
    if queries.shape[1] == 1 and takes(size, pool[0].shape[3], queries.dtype):
        lengths = jnp.where(positions[:, 0] < capacity, positions[:, 0] + 1, 0)
        return _decode(queries[:, 0], keys, values, pages, lengths)[0][:, None], (keys, values)
    rows = gather_pages(keys, pages), gather_pages(values, pages)
    return cached_attention(queries, *rows, positions), (keys, values)


def write_pages(
    pool: Float[Array, "K N P d"],
    new: Float[Array, "R T K d"],
    pages: Int[Array, "R C"],
    positions: Int[Array, "R T"],
) -> Float[Array, "K N P d"]:
    """Write new keys, or values, into the pages of their rows.

    Args:
      pool: all pages.
      new: what is written.
      pages: the pages of each row.
      positions: where it is written in its row; a position beyond the table's pages is dropped.
    """
    size, columns = pool.shape[2], pages.shape[1]
    column = positions // size
    page = jnp.take_along_axis(pages, jnp.minimum(column, columns - 1), axis=1)
    page = jnp.where(column < columns, page, pool.shape[1])
    return jax.lax.platform_dependent(pool, new, page, positions % size, tpu=_write_flat, default=_write)


def _write(pool: Array, new: Array, page: Array, place: Array) -> Array:
    return pool.at[:, page, place].set(jnp.moveaxis(new, 2, 0), mode="drop")


def _write_flat(pool: Array, new: Array, page: Array, place: Array) -> Array:
    kv_heads, num_pages, size, depth = pool.shape
    if depth % tpu.LANES:
        return _write(pool, new, page, place)
    block = jnp.where(page < num_pages, page, kv_heads * num_pages)[..., None]
    block = block + num_pages * jnp.arange(kv_heads)[None, None]
    return tpu.write_flat(pool, new, block * size + place[..., None])


def gather_pages(pool: Float[Array, "K N P d"], pages: Int[Array, "R C"]) -> Float[Array, "R K L d"]:
    """Copy the pages of each row into one row of ``L = C * P`` keys or values."""
    kv_heads, _, size, depth = pool.shape
    rows, columns = pages.shape
    found = jnp.moveaxis(jnp.take(pool, pages, axis=1, mode="clip"), 0, 1)
    return found.reshape(rows, kv_heads, columns * size, depth)


def takes(size: int, head_dim: int, dtype: jnp.dtype) -> bool:
    """Return whether the kernels support this page size, head size and type."""
    is_power = size & (size - 1) == 0
    return (
        is_power
        and 8 <= size <= BLOCK
        and head_dim in (64, 128, 256)
        and dtype in (jnp.float32, jnp.bfloat16)
    )


def gather_decode(queries: Array, keys: Array, values: Array, pages: Array, lengths: Array) -> tuple[Array]:
    """Compute a decode step over rows that are gathered first: the definition of the kernels."""
    rows = gather_pages(keys, pages), gather_pages(values, pages)
    return (attend(queries[:, None], *rows, lengths[:, None] - 1)[:, 0],)


def decode_gpu(
    queries: Float[Array, "R H d"],
    keys: Float[Array, "K N P d"],
    values: Float[Array, "K N P d"],
    pages: Int[Array, "R C"],
    lengths: Int[Array, "R"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "R H d"]]:
    """Compute attention of one query per row over the first ``lengths[r]`` keys of row ``r``, on a GPU.

    Args:
      queries: rotated queries.
      keys: the pages of all keys.
      values: the pages of all values.
      pages: the pages of each row.
      lengths: number of keys that each row sees; a row of length 0 returns zeros.
      interpret: run the kernel on a CPU, for tests.

    Returns:
      A tuple with the attention output, in the type of the queries.
    """
    most = min(BLOCK, BLOCK_BYTES // (keys.shape[3] * keys.dtype.itemsize))
    if keys.shape[2] > most:
        return gather_decode(queries, keys, values, pages, lengths)
    # Only a GPU needs Pallas, which takes a while to load.
    from jax.experimental.pallas.ops.gpu import paged_attention as kernels

    at_once = count_pages(pages.shape[1], keys.shape[2], most)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        output = kernels.paged_attention(
            scale(queries),
            keys,
            values,
            pages,
            lengths,
            pages_per_compute_block=at_once,
            k_splits=count_splits(queries.shape[0] * keys.shape[0], pages.shape[1] // at_once),
            interpret=interpret,
        )
    return (output.astype(queries.dtype),)


def count_pages(columns: int, size: int, keys: int) -> int:
    """Return the number of pages that a GPU's program reads at a time: a power of 2 that divides a row's.

    Args:
      columns: pages of a row.
      size: tokens of a page.
      keys: most keys at a time.
    """
    most = max(1, keys // size)
    return max(n for n in (1, 2, 4, 8, 16, 32) if n <= most and columns % n == 0)


def decode_tpu(queries: Array, keys: Array, values: Array, pages: Array, lengths: Array) -> tuple[Array]:
    """Compute the same on a TPU, where an idle row gives some finite number."""
    if not tpu.takes(keys.shape[3], queries.dtype, keys.shape[2]):
        return gather_decode(queries, keys, values, pages, lengths)
    return (tpu.decode_pages(queries, keys, values, pages, lengths),)


_decode = by_platform("paged_decode_attention", gather_decode, cuda=decode_gpu, tpu=decode_tpu)
