"""The XLA back end: attention in tiles, with a hand-written backward pass.

The queries are processed in blocks. Each block sees only the keys up to its own end, so the blocks above the
diagonal are never computed. The backward pass recomputes each block's weights from the normalizer, so that no
attention weights stay in memory.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from empg_jax.models.attention.cached import MASKED
from empg_jax.models.attention.operands import Operands


def forward(
    queries: Float[Array, "B T H d"],
    keys: Float[Array, "B T K d"],
    values: Float[Array, "B T K d"],
    segment_ids: Int[Array, "B T"],
    *,
    block: int,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B H T"]]:
    """Compute output and normalizer (see `packed`) in query blocks of at least ``block`` tokens."""
    length, kv_heads, depth = queries.shape[1], keys.shape[2], queries.shape[3]
    q, k, v = _grouped(queries, kv_heads), jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
    outputs, normalizers = [], []
    for start, stop in _blocks(length, block):
        causal = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
        same = segment_ids[:, start:stop, None] == segment_ids[:, None, :stop]
        visible = jnp.logical_and(causal[None], same)[:, None, None]
        scores = jnp.einsum(
            "bkgtd,bksd->bkgts", q[:, :, :, start:stop], k[:, :, :stop], preferred_element_type=jnp.float32
        )
        scores = jnp.where(visible, scores * jnp.float32(depth**-0.5), jnp.float32(MASKED))
        largest = jnp.max(scores, axis=-1)
        weights = jnp.exp(scores - largest[..., None])
        total = jnp.sum(weights, axis=-1)
        output = jnp.einsum(
            "bkgts,bksd->bkgtd",
            weights.astype(values.dtype),
            v[:, :, :stop],
            preferred_element_type=jnp.float32,
        )
        outputs.append(output / total[..., None])
        normalizers.append(largest + jnp.log(total))
    output = _ungrouped(jnp.concatenate(outputs, axis=3).astype(queries.dtype))
    return output, jnp.concatenate(normalizers, axis=3).reshape(len(queries), -1, length)


def backward(
    operands: Operands,
    output: Float[Array, "B T H d"],
    normalizer: Float[Array, "B H T"],
    slope: Float[Array, "B T H d"],
    *,
    block: int,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B T K d"], Float[Array, "B T K d"]]:
    """Compute the gradients of queries, keys and values (see `packed`).

    Every weight matrix here has the keys as its first axis, so that no weight matrix is ever transposed.
    """
    queries, keys, values, segment_ids = operands
    batch, length, heads, depth = queries.shape
    kv_heads, groups, scale = keys.shape[2], heads // keys.shape[2], jnp.float32(depth**-0.5)
    q, k, v = _grouped(queries, kv_heads), jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
    g = _grouped(slope, kv_heads)
    normalizer = normalizer.reshape(batch, kv_heads, groups, length)
    # The softmax's gradient is w * (dw - sum(w dw)); sum(w dw) equals the dot product of slope and output.
    mean_slope = jnp.sum(g.astype(jnp.float32) * _grouped(output, kv_heads).astype(jnp.float32), axis=-1)
    d_queries = []
    d_keys = d_values = jnp.zeros(k.shape, jnp.float32)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    for start, stop in _blocks(length, block):
        count = stop - start
        flat, table = (batch, kv_heads, groups * count, depth), (batch, kv_heads, stop, groups, count)
        q_block, g_block = q[:, :, :, start:stop].reshape(flat), g[:, :, :, start:stop].reshape(flat)
        causal = jnp.arange(stop)[:, None] <= jnp.arange(start, stop)[None, :]
        same = segment_ids[:, :stop, None] == segment_ids[:, None, start:stop]
        visible = jnp.logical_and(causal[None], same)[:, None, :, None]
        scores = dot("bksd,bktd->bkst", k[:, :, :stop], q_block).reshape(table)
        scores = jnp.where(visible, scores * scale, jnp.float32(MASKED))
        weights = jnp.exp(scores - normalizer[:, :, None, :, start:stop])
        d_weights = dot("bksd,bktd->bkst", v[:, :, :stop], g_block).reshape(table)
        d_scores = weights * (d_weights - mean_slope[:, :, None, :, start:stop]) * scale
        weights = weights.astype(values.dtype).reshape(batch, kv_heads, stop, groups * count)
        d_scores = d_scores.astype(queries.dtype).reshape(weights.shape)
        d_values = d_values.at[:, :, :stop].add(dot("bkst,bktd->bksd", weights, g_block))
        d_keys = d_keys.at[:, :, :stop].add(dot("bkst,bktd->bksd", d_scores, q_block))
        d_block = dot("bksd,bkst->bkdt", k[:, :, :stop], d_scores)
        d_queries.append(jnp.swapaxes(d_block.reshape(batch, kv_heads, depth, groups, count), 2, 3))
    d_query = _ungrouped(jnp.swapaxes(jnp.concatenate(d_queries, axis=-1), -1, -2))
    return (
        d_query.astype(queries.dtype),
        jnp.swapaxes(d_keys, 1, 2).astype(keys.dtype),
        jnp.swapaxes(d_values, 1, 2).astype(values.dtype),
    )


def _blocks(length: int, block: int) -> list[tuple[int, int]]:
    # Each block is unrolled into the program, so their number is limited to 16 to keep compilation short.
    block = max(block, -(-length // 16))
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def _grouped(x: Float[Array, "B T H d"], kv_heads: int) -> Float[Array, "B K G T d"]:
    batch, length, heads, depth = x.shape
    grouped = x.reshape(batch, length, kv_heads, heads // kv_heads, depth)
    return jnp.transpose(grouped, (0, 2, 3, 1, 4))


def _ungrouped(x: Float[Array, "B K G T d"]) -> Float[Array, "B T H d"]:
    batch, kv_heads, groups, length, depth = x.shape
    return jnp.transpose(x, (0, 3, 1, 2, 4)).reshape(batch, length, kv_heads * groups, depth)
