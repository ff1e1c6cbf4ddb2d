"""Decode on GPUs: JAX's Pallas Triton kernel (``jax.experimental.pallas.ops.gpu.decode_attention``).

One query per row against a cache of which each row has filled its own share. The kernel reads the filled part
only, and cuts it into pieces that run side by side, so that a single conversation keeps a whole device busy.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import decode_attention as kernels
from jaxtyping import Array, Float, Int

# Keys that a program reads at a time; the cache's length must be a multiple of it.
BLOCK = 128
# Programs that keep a large device busy: two for each of an H100's 132 multiprocessors.
PROGRAMS = 264


def takes(capacity: int, head_dim: int, dtype: jnp.dtype) -> bool:
    """Whether the kernel takes a cache of this length, heads of this size and this type."""
    return capacity % BLOCK == 0 and head_dim in (64, 128, 256) and dtype in (jnp.float32, jnp.bfloat16)


def decode(
    queries: Float[Array, "R H d"],
    keys: Float[Array, "R K C d"],
    values: Float[Array, "R K C d"],
    lengths: Int[Array, "R"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "R H d"]]:
    """Attention of one query per row over the first ``lengths[r]`` keys of its row; zeros where none is.

    Args:
      queries: rotated queries.
      keys: the cache.
      values: likewise.
      lengths: keys that each row sees.
      interpret: run the kernel on a CPU, for tests.
    """
    rows, heads, depth = queries.shape
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    flat = rows * kv_heads
    # The kernel mixes truth values and floats.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        output = kernels.mqa(
            queries.reshape(flat, heads // kv_heads, depth),
            keys.reshape(flat, capacity, depth),
            values.reshape(flat, capacity, depth),
            kv_seq_len=jnp.repeat(lengths, kv_heads),
            block_k=BLOCK,
            k_splits=count_splits(flat, capacity // BLOCK),
            interpret=interpret,
        )
    return (output.reshape(rows, heads, depth).astype(queries.dtype),)


def count_splits(rows: int, blocks: int) -> int:
    """Pieces that each row is cut into: a divisor of its blocks, as many as keep the device busy."""
    wanted = max(1, PROGRAMS // rows)
    return max(n for n in range(1, blocks + 1) if blocks % n == 0 and n <= wanted)
