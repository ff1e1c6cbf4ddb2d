"""The TPU back end: JAX's splash attention (``jax.experimental.pallas.ops.tpu.splash_attention``).

The kernel works on one row ``[H T d]`` and is mapped over the batch. It supports grouped heads and segments
and skips the blocks above the diagonal. It does not scale the scores, so the queries are scaled before. Rows
are padded at the end to a whole number of blocks; no causal query of a real token sees the padding.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from empg_jax.models.attention.operands import Operands, scale
from empg_jax.models.attention.tpu import LANES, largest_block


def forward(
    queries: Float[Array, "B T H d"],
    keys: Float[Array, "B T K d"],
    values: Float[Array, "B T K d"],
    segment_ids: Int[Array, "B T"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B H T"]]:
    """Compute output and normalizer (see `packed`). ``interpret`` runs the kernel on a CPU, for tests."""
    length = queries.shape[1]
    kernel = _make_kernel(queries, interpret)

    def one_row(q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, Array]:
        output, (normalizer,) = kernel(q, k, v, segment_ids=kernels.SegmentIds(segments, segments))
        return output, normalizer

    output, normalizer = jax.vmap(one_row)(
        _rows(scale(queries)), _rows(keys), _rows(values), _pad(segment_ids, axis=1)
    )
    return jnp.swapaxes(output, 1, 2)[:, :length], normalizer[:, :, :length]


def backward(
    operands: Operands,
    output: Float[Array, "B T H d"],
    normalizer: Float[Array, "B H T"],
    slope: Float[Array, "B T H d"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B T K d"], Float[Array, "B T K d"]]:
    """Compute the gradients of queries, keys and values (see `packed`)."""
    queries, keys, values, segment_ids = operands
    kernel = _make_kernel(queries, interpret)

    def one_row(
        row: tuple[Array, Array, Array], segments: Array, output: Array, normalizer: Array, slope: Array
    ) -> tuple[Array, Array, Array]:
        ids = kernels.SegmentIds(segments, segments)
        known = (*row, ids, None, output, normalizer, kernel.dq_mask_info, kernel.dkv_mask_info)
        return kernels._splash_attention_bwd(**kernel.kwargs, res=known, do=slope)[3:6]

    slopes = jax.vmap(one_row)(
        (_rows(scale(queries)), _rows(keys), _rows(values)),
        _pad(segment_ids, axis=1),
        _rows(output),
        _pad(normalizer, axis=2),
        _rows(slope.astype(queries.dtype)),
    )
    d_queries, d_keys, d_values = (jnp.swapaxes(x, 1, 2)[:, : queries.shape[1]] for x in slopes)
    return scale(d_queries), d_keys, d_values


def _make_kernel(queries: Array, interpret: bool) -> kernels.SplashAttentionKernel:
    # Not staged, so that traces can share it.
    with jax.ensure_compile_time_eval():
        return _kernel_of(-(-queries.shape[1] // LANES) * LANES, queries.shape[2], interpret)


@functools.lru_cache(maxsize=8)  # the mask of long rows takes seconds
def _kernel_of(length: int, heads: int, interpret: bool) -> kernels.SplashAttentionKernel:
    block = largest_block(length)
    causal = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return kernels.make_splash_mha(
        causal,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        save_residuals=True,
        interpret=interpret,
    )


def _rows(x: Float[Array, "B T n d"]) -> Float[Array, "B n P d"]:
    """Return ``x`` with heads first and time padded to ``P``.

    Padding needs no mask in the backward pass, because its output gradient is zero.
    """
    return _pad(jnp.swapaxes(x, 1, 2), axis=2)


def _pad(x: Array, axis: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % LANES)
    return jnp.pad(x, widths)
