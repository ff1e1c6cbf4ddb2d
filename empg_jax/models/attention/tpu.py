"""The cache on TPUs: writing in place, and decode by JAX's kernel (``pallas.ops.tpu.paged_attention``).

The kernel reads the filled part of each row only. It is made for pages, and rows are pages in their order:
they need a table, and no other layout.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from empg_jax.models.attention.joined import narrow, spread
from empg_jax.models.attention.operands import scale

# Keys that a kernel takes at a time: 512 of 128 numbers in bfloat16 have 128 KiB, and their values as much.
BLOCKS = (512, 256, 128)
# Numbers side by side in a tile. For narrower heads, unless `joined`, the compiler lays the cache out along
# other axes.
LANES = 128
# Most numbers of a page table: half of a core's scalar memory of 1 MiB.
SCALARS = 2**17


def takes(width: int, dtype: jnp.dtype, page_tokens: int) -> bool:
    """Return whether the kernel supports this width of a head, type and page size.

    It would round keys and values of float32 to bfloat16.
    """
    return dtype == jnp.bfloat16 and width % LANES == 0 and page_tokens >= 16


def write_flat(
    cache: Float[Array, "A B C d"], new: Float[Array, "R T K d"], places: Int[Array, "R T K"]
) -> Float[Array, "A B C d"]:
    """Write keys, or values, at rows of a flat view, which a TPU does in place.

    With an index for each axis its compiler turns the whole cache around, for one program, and back. A flat
    view of narrow heads (`LANES`) would be turned for every write.

    Args:
      cache: all of them, in rows or pages.
      new: what is written.
      places: where each head's are written, counted over all axes; a place beyond the cache is dropped.
    """
    flat = cache.reshape(-1, cache.shape[3])
    return flat.at[places].set(new, mode="drop").reshape(cache.shape)


def decode_pages(
    queries: Float[Array, "R H d"],
    keys: Float[Array, "J N P w"],
    values: Float[Array, "J N P w"],
    pages: Int[Array, "R C"],
    lengths: Int[Array, "R"],
) -> Float[Array, "R H d"]:
    """Compute attention of one query per row over the first ``lengths[r]`` keys of row ``r``, in its pages.

    Args:
      queries: rotated queries.
      keys: the pages of all keys; narrow heads are `joined`.
      values: the pages of all values.
      pages: the pages of each row.
      lengths: number of keys that each row sees; a row of length 0 gives some finite number.

    Returns:
      The attention output, in the type of the queries.
    """
    pages, at_once = pad_table(pages, keys.shape[2])
    if pages.size > SCALARS:
        most = SCALARS // pages.shape[1]
        parts = (slice(start, start + most) for start in range(0, len(pages), most))
        outputs = [decode_pages(queries[p], keys, values, pages[p], lengths[p]) for p in parts]
        return jnp.concatenate(outputs)
    # Only a TPU needs Pallas, which takes a while to load.
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as kernel

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        output = kernel(
            # In float32: the kernel adds its output up in the queries' type, rounded after every block.
            spread(scale(queries.astype(jnp.float32)), keys.shape[0], keys.shape[3]),
            keys,
            values,
            jnp.maximum(lengths, 1),  # it waits for a first page of every row
            pages,
            pages_per_compute_block=at_once,
        )
    return narrow(output.astype(queries.dtype), keys.shape[0], queries.shape[2])


def decode_rows(
    queries: Float[Array, "R H d"],
    keys: Float[Array, "R J C w"],
    values: Float[Array, "R J C w"],
    lengths: Int[Array, "R"],
) -> Float[Array, "R H d"]:
    """Compute the same over rows: each head of a row is a row of pages of its own, in their order."""
    rows, kv_heads, capacity, width = keys.shape
    flat, size = rows * kv_heads, largest_block(capacity)
    output = decode_pages(
        queries.reshape(flat, -1, queries.shape[2]),
        keys.reshape(1, -1, size, width),
        values.reshape(1, -1, size, width),
        jnp.arange(flat * capacity // size, dtype=jnp.int32).reshape(flat, -1),
        jnp.repeat(lengths, kv_heads),
    )
    return output.reshape(queries.shape)


def largest_block(length: int) -> int:
    """Return the largest block that divides a row, whose length is a multiple of `LANES`."""
    return next(size for size in BLOCKS if length % size == 0)


def pad_table(pages: Int[Array, "R C"], size: int) -> tuple[Int[Array, "R D"], int]:
    """Lengthen a page table to a multiple of the pages that the kernel reads at a time; return both.

    Args:
      pages: the pages of each row. What is added behind them is not read.
      size: tokens of a page.
    """
    columns = pages.shape[1]
    at_once = min(2 ** int(math.log2(max(1, BLOCKS[0] // size))), 2 ** math.ceil(math.log2(columns)))
    return jnp.pad(pages, ((0, 0), (0, -columns % at_once))), at_once
