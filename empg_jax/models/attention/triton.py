"""The GPU back end: JAX's Pallas Triton kernel (``jax.experimental.pallas.ops.gpu.attention``).

The kernel needs one key/value head per query head and a whole number of blocks. Keys and values are therefore
repeated over their groups, and rows are padded at the end, where no causal query of a real token looks. The
kernel's own custom derivative does not expose the normalizer. This module therefore calls the forward kernel
with residuals and the backward kernels directly, so that nothing is computed twice.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as kernels
from jaxtyping import Array, Float, Int

from empg_jax.models.attention.operands import Operands

# Rows are padded to a multiple of this length; every block length below divides it.
GRAIN = 128


def forward(
    queries: Float[Array, "B T H d"],
    keys: Float[Array, "B T K d"],
    values: Float[Array, "B T K d"],
    segment_ids: Int[Array, "B T"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B H T"]]:
    """Compute output and normalizer (see `packed`). ``interpret`` runs the kernel on a CPU, for tests."""
    length, depth = queries.shape[1], queries.shape[3]
    q, k, v, segments = _prepare(queries, keys, values, segment_ids)
    output, log2_total = kernels.mha(
        q,
        k,
        v,
        segments,
        sm_scale=depth**-0.5,
        causal=True,
        block_sizes=_block_sizes(depth, queries.dtype),
        return_residuals=True,
        interpret=interpret,
    )
    # The kernel works with powers of 2; the interface uses the natural logarithm.
    return output[:, :length], log2_total[:, :, :length] * jnp.float32(math.log(2))


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
    length, depth = queries.shape[1], queries.shape[3]
    prepared = _prepare(queries, keys, values, segment_ids)
    log2_total = normalizer * jnp.float32(1 / math.log(2))
    log2_total = jnp.pad(log2_total, ((0, 0), (0, 0), (0, -length % GRAIN)))
    d_queries, d_keys, d_values, _ = kernels._mha_backward(
        sm_scale=depth**-0.5,
        causal=True,
        block_sizes=_block_sizes(depth, queries.dtype),
        backward_pass_impl="triton",
        num_warps=None,
        num_stages=2,
        grid=None,
        interpret=interpret,
        debug=False,
        return_residuals=False,
        res=(*prepared, _pad(output), log2_total),
        do=_pad(slope.astype(queries.dtype)),
    )
    d_keys, d_values = (_sum_groups(x, keys) for x in (d_keys, d_values))
    return d_queries[:, :length], d_keys, d_values


def _prepare(queries: Array, keys: Array, values: Array, segment_ids: Array) -> tuple[Array, ...]:
    groups = queries.shape[2] // keys.shape[2]
    k, v = (_pad(jnp.repeat(x, groups, axis=2)) for x in (keys, values))
    return _pad(queries), k, v, _pad(segment_ids)


def _pad(x: Array) -> Array:
    """Pad the end of each row with zeros.

    Padding needs no mask in the backward pass, because its output gradient is zero.
    """
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % GRAIN)) + ((0, 0),) * (x.ndim - 2))


def _sum_groups(slope: Array, like: Array) -> Array:
    """Sum the gradients ``[B T' H d]`` of repeated heads in float32 to gradients of ``like [B T K d]``."""
    batch, length, kv_heads, depth = like.shape
    grouped = slope[:, :length].reshape(batch, length, kv_heads, -1, depth)
    return jnp.sum(grouped, axis=3, dtype=jnp.float32).astype(like.dtype)


def _block_sizes(depth: int, dtype: jnp.dtype) -> kernels.BlockSizes:
    """Return block sizes that fit shared memory: one block of queries, two stages of keys and of values.

    The kernel's default sizes do not compile for float32 or for heads of 256. These sizes compile for every
    GPU from an L4 (99 KB of shared memory) up (``scripts/compile_ahead.py``). On GPUs with more shared memory
    the backward blocks are twice as long: on an H100 with heads of 128 in bfloat16, forward and backward
    together then take 3.2 ms instead of 5.8 ms (4 rows of 4,096 tokens, 12 heads).
    """
    rows = 16384 // (depth * jnp.dtype(dtype).itemsize)
    small = min(rows, 64 if _shared_memory_kb() >= 160 else 32)
    return kernels.BlockSizes(min(2 * rows, 128), min(rows, 128), small, small, small, small)


def _shared_memory_kb() -> int:
    """Return the shared memory in KB that a block may use on this process's first device.

    An unknown device, or no GPU at all, counts as the smallest known GPU.
    """
    device = jax.devices()[0]
    by_capability = {"8.0": 163, "8.7": 163, "9.0": 227, "10.0": 227}
    return by_capability.get(str(getattr(device, "compute_capability", "")), 99)
