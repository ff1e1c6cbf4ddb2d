"""The GPU decode step: JAX's Pallas Triton kernel (``jax.experimental.pallas.ops.gpu.decode_attention``).

Each row has one query and its own number of filled cache positions. The kernel reads only the filled part. It
splits this part into pieces that run in parallel, so that even one conversation keeps a whole device busy.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Number of keys that a kernel program reads at a time; the cache's length must be a multiple of it.
BLOCK = 128
# Number of kernel programs that keeps a large device busy: two for each of an H100's 132 multiprocessors.
PROGRAMS = 264


def takes(capacity: int, head_dim: int, dtype: jnp.dtype) -> bool:
    """Return whether the kernel supports this cache length, head size and type."""
    return capacity % BLOCK == 0 and head_dim in (64, 128, 256) and dtype in (jnp.float32, jnp.bfloat16)


def decode(
    queries: Float[Array, "R H d"],
    keys: Float[Array, "R K C d"],
    values: Float[Array, "R K C d"],
    lengths: Int[Array, "R"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "R H d"]]:
    """Compute attention of one query per row over the first ``lengths[r]`` keys of row ``r``.

    Args:
      queries: rotated queries.
      keys: the cached keys.
      values: the cached values.
      lengths: number of keys that each row sees; a row of length 0 returns zeros.
      interpret: run the kernel on a CPU, for tests.

    Returns:
      A tuple with the attention output, in the type of the queries.
    """
    # It loads Pallas, which only a GPU needs and which takes a while.
    from jax.experimental.pallas.ops.gpu import decode_attention as kernels

    rows, heads, depth = queries.shape
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    flat = rows * kv_heads
    # The kernel multiplies booleans with floats, which strict dtype promotion would refuse.
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
    """Return the number of pieces that each row is split into.

    It is the largest divisor of ``blocks`` for which all rows together have at most `PROGRAMS` programs.
    """
    wanted = max(1, PROGRAMS // rows)
    return max(n for n in range(1, blocks + 1) if blocks % n == 0 and n <= wanted)
