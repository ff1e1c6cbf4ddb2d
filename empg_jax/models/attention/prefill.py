"""Prefill on TPUs: attention of many new tokens over a KV cache, without scores in memory.

A flash kernel: a block of queries goes over the blocks of keys up to the newest one that it sees, and keeps
the running maximum and sum of the softmax. The cache behind that key is not read. The module loads Pallas, so
that only programs for a TPU import it (`dispatch.load_late`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from empg_jax.models.attention import cached
from empg_jax.models.attention.joined import narrow, spread
from empg_jax.models.attention.tpu import LANES, largest_block

ROWS = 512  # most rows of a block of queries: tokens times the query heads of a key head


def attend_on_tpu(queries: Array, keys: Array, values: Array, positions: Array) -> tuple[Array]:
    """Compute a prefill by the kernel where it takes the shapes, else by products."""
    body = attend if takes(queries, keys) else cached.attend
    return (body(queries, keys, values, positions),)


def takes(queries: jax.Array, keys: jax.Array) -> bool:
    """Return whether the kernel supports these queries ``[R T H d]`` over these keys ``[R J C w]``."""
    _, _, capacity, width = keys.shape
    is_tiled = width % LANES == 0 and capacity % LANES == 0 and queries.shape[1] % 16 == 0
    return queries.dtype == jnp.bfloat16 and is_tiled


def attend(
    queries: Float[Array, "R T H d"],
    keys: Float[Array, "R J C w"],
    values: Float[Array, "R J C w"],
    positions: Int[Array, "R T"],
    *,
    interpret: bool = False,
) -> Float[Array, "R T H d"]:
    """Compute attention of consecutive new tokens of each row over the row's cache.

    Args:
      queries: rotated queries.
      keys: the cached keys, those of the new tokens included; narrow heads are `joined`.
      values: the cached values.
      positions: the first tokens of a row have consecutive positions, the others are pads (``C``).
      interpret: run the kernel on a CPU, for tests.

    Returns:
      The attention output, in the type of the queries; that of a pad is finite.
    """
    rows, length, heads, depth = queries.shape
    _, kv_heads, capacity, width = keys.shape
    groups = heads // kv_heads
    tokens = math.gcd(length, max(16, 2 ** int(math.log2(ROWS // groups))))
    flash = _Flash(groups, tokens, largest_block(capacity), depth**-0.5)
    wide = spread(queries, kv_heads, width)
    grouped = jnp.transpose(wide.reshape(rows, length, kv_heads, groups, width), (0, 2, 3, 1, 4))
    query_block = pl.BlockSpec((None, None, groups, tokens, width), flash.place_queries)
    key_block = pl.BlockSpec((None, None, flash.keys, width), flash.place_keys)
    output = pl.pallas_call(
        flash.run,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            in_specs=[query_block, key_block, key_block],
            out_specs=query_block,
            grid=(rows, kv_heads, length // tokens, capacity // flash.keys),
            # The largest score, the sum of the weights (both in all lanes), and the weighted values.
            scratch_shapes=[
                pltpu.VMEM((groups * tokens, size), jnp.float32) for size in (LANES, LANES, width)
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(grouped.shape, queries.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="prefill_attention",
    )(positions[:, 0], jnp.sum(positions < capacity, axis=1, dtype=jnp.int32), grouped, keys, values)
    output = jnp.transpose(output, (0, 3, 1, 2, 4)).reshape(wide.shape)
    return narrow(output, kv_heads, depth)


@dataclasses.dataclass(frozen=True)
class _Flash:
    """The kernel: program (row, key head, part of the row's tokens, block of keys).

    Attributes:
      groups: query heads of a key head.
      tokens: new tokens of a part.
      keys: keys of a block.
      scale: factor of the scores.
    """

    groups: int
    tokens: int
    keys: int
    scale: float

    def count_blocks(self, row: Any, part: Any, start: Any, count: Any) -> Array:
        """Count the blocks of keys that a part sees, given the first position and the tokens of each row."""
        end = start[row] + jnp.minimum((part + 1) * self.tokens, count[row])
        blocks = jax.lax.div(end + self.keys - 1, self.keys)
        return jnp.where(part * self.tokens < count[row], blocks, 0)

    def place_queries(self, row: Any, head: Any, part: Any, number: Any, *_: Any) -> tuple[Any, ...]:
        """Return the block of queries, and of the output, of a program."""
        return row, head, 0, part, 0

    def place_keys(self, row: Any, head: Any, part: Any, number: Any, *spans: Any) -> tuple[Any, ...]:
        """Return the block of keys of a program. Behind the last one it stays there: nothing is read."""
        last = jnp.maximum(self.count_blocks(row, part, *spans) - 1, 0)
        return row, head, jnp.clip(number, 0, last), 0

    def run(self, *refs: Any) -> None:
        """Add a block of keys, if the part sees it."""
        spans, inputs, output, sums = refs[:2], refs[2:5], refs[5], refs[6:]
        row, part, number = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        largest, total, weighted = sums

        @pl.when(number == 0)
        def begin() -> None:
            largest[...] = jnp.full_like(largest, cached.MASKED)
            total[...] = jnp.zeros_like(total)
            weighted[...] = jnp.zeros_like(weighted)

        @pl.when(number < self.count_blocks(row, part, *spans))
        def add() -> None:
            self.add(spans[0][row] + part * self.tokens, number * self.keys, inputs, sums)

        @pl.when(number == pl.num_programs(3) - 1)
        def end() -> None:
            whole = jnp.where(total[:, :1] == 0, jnp.float32(1), total[:, :1])  # no token of it is real
            output[...] = (weighted[...] / whole).astype(output.dtype).reshape(output.shape)

    def add(self, position: Array, key: Array, inputs: tuple[Any, ...], sums: tuple[Any, ...]) -> None:
        """Add a block, given the positions of its first query and its first key."""
        q, k, v = (ref[...] for ref in inputs)
        largest, total, weighted = sums
        shape = self.groups, self.tokens, self.keys
        transposed = (((1,), (1,)), ((), ()))
        scores = jax.lax.dot_general(
            q.reshape(-1, q.shape[-1]), k, transposed, preferred_element_type=jnp.float32
        ) * jnp.float32(self.scale)
        queries = position + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        visible = key + jax.lax.broadcasted_iota(jnp.int32, shape, 2) <= queries
        scores = jnp.where(visible.reshape(scores.shape), scores, jnp.float32(cached.MASKED))
        before = largest[:, :1]
        now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights, left = jnp.exp(scores - now), jnp.exp(before - now)
        added = jnp.sum(weights, axis=1, keepdims=True)
        largest[...] = jnp.broadcast_to(now, largest.shape)
        total[...] = jnp.broadcast_to(total[:, :1] * left + added, total.shape)
        product = jax.lax.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        weighted[...] = weighted[...] * left + product
