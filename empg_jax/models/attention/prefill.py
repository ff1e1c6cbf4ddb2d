"""Prefill on TPUs: attention of many new tokens over a KV cache, without scores in memory.

A flash kernel: a block of queries goes over the blocks of keys up to the newest one that it sees, and keeps
the running maximum and sum of the softmax. The cache behind that key is not read.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

KEYS = (512, 256, 128)  # keys of a block; the largest one that divides the cache's length is used
ROWS = 512  # most rows of a block of queries: tokens times the query heads of a key head
LANES = 128
HIDDEN = -1e30  # score of a hidden key


def takes(queries: jax.Array, capacity: int) -> bool:
    """Return whether the kernel supports these queries ``[R T H d]`` over a cache of this length."""
    _, length, _, depth = queries.shape
    is_tiled = depth % LANES == 0 and capacity % KEYS[-1] == 0 and length % 16 == 0
    return queries.dtype == jnp.bfloat16 and is_tiled


def attend(
    queries: Float[Array, "R T H d"],
    keys: Float[Array, "R K C d"],
    values: Float[Array, "R K C d"],
    positions: Int[Array, "R T"],
    *,
    interpret: bool = False,
) -> Float[Array, "R T H d"]:
    """Compute attention of consecutive new tokens of each row over the row's cache.

    Args:
      queries: rotated queries.
      keys: the cached keys, those of the new tokens included.
      values: the cached values.
      positions: the first tokens of a row have consecutive positions, the others are pads (``C``).
      interpret: run the kernel on a CPU, for tests.

    Returns:
      The attention output, in the type of the queries; that of a pad is finite.
    """
    # Only a TPU needs Pallas, which takes a while to load.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, length, heads, depth = queries.shape
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    groups = heads // kv_heads
    tokens = math.gcd(length, max(16, 2 ** int(math.log2(ROWS // groups))))
    block = next(size for size in KEYS if capacity % size == 0)
    start = positions[:, 0]
    count = jnp.sum(positions < capacity, axis=1, dtype=jnp.int32)

    def count_blocks(row: Array, part: Array, start: Any, count: Any) -> Array:
        """Count the blocks of keys that a part of a row's queries sees."""
        end = start[row] + jnp.minimum((part + 1) * tokens, count[row])
        return jnp.where(part * tokens < count[row], jax.lax.div(end + block - 1, block), 0)

    def place_queries(row: Array, head: Array, part: Array, number: Array, *_: Any) -> tuple[Any, ...]:
        return row, head, 0, part, 0

    def place_keys(row: Array, head: Array, part: Array, number: Array, *spans: Any) -> tuple[Any, ...]:
        # Behind the last block it stays there, and nothing is read.
        return row, head, jnp.clip(number, 0, jnp.maximum(count_blocks(row, part, *spans) - 1, 0)), 0

    def kernel(
        start: Any, count: Any, q: Any, k: Any, v: Any, output: Any, largest: Any, total: Any, sums: Any
    ) -> None:
        row, part, number = pl.program_id(0), pl.program_id(2), pl.program_id(3)

        @pl.when(number == 0)
        def begin() -> None:
            largest[...] = jnp.full_like(largest, HIDDEN)
            total[...] = jnp.zeros_like(total)
            sums[...] = jnp.zeros_like(sums)

        @pl.when(number < count_blocks(row, part, start, count))
        def add() -> None:
            scores = jax.lax.dot_general(
                q[...].reshape(groups * tokens, depth),
                k[...],
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            shape = (groups, tokens, block)
            position = start[row] + part * tokens + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            key = number * block + jax.lax.broadcasted_iota(jnp.int32, shape, 2)
            visible = (key <= position).reshape(groups * tokens, block)
            scores = jnp.where(visible, scores * jnp.float32(depth**-0.5), jnp.float32(HIDDEN))
            before = largest[:, :1]
            now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            weights, left = jnp.exp(scores - now), jnp.exp(before - now)
            largest[...] = jnp.broadcast_to(now, largest.shape)
            added = jnp.sum(weights, axis=1, keepdims=True)
            total[...] = jnp.broadcast_to(total[:, :1] * left + added, total.shape)
            product = jax.lax.dot(weights.astype(v.dtype), v[...], preferred_element_type=jnp.float32)
            sums[...] = sums[...] * left + product

        @pl.when(number == pl.num_programs(3) - 1)
        def end() -> None:
            whole = jnp.where(total[:, :1] == 0, jnp.float32(1), total[:, :1])  # no token of it is real
            output[...] = (sums[...] / whole).astype(output.dtype).reshape(output.shape)

    grouped = jnp.transpose(queries.reshape(rows, length, kv_heads, groups, depth), (0, 2, 3, 1, 4))
    query_block = pl.BlockSpec((None, None, groups, tokens, depth), place_queries)
    key_block = pl.BlockSpec((None, None, block, depth), place_keys)
    output = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            in_specs=[query_block, key_block, key_block],
            out_specs=query_block,
            grid=(rows, kv_heads, length // tokens, capacity // block),
            scratch_shapes=[
                pltpu.VMEM((groups * tokens, LANES), jnp.float32),
                pltpu.VMEM((groups * tokens, LANES), jnp.float32),
                pltpu.VMEM((groups * tokens, depth), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(grouped.shape, queries.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="prefill_attention",
    )(start, count, grouped, keys, values)
    return jnp.transpose(output, (0, 3, 1, 2, 4)).reshape(queries.shape)
