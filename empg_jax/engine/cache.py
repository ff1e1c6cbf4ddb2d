"""Device programs that move keys and values without computing any."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from empg_jax.models.decoder import KVCache

COPIED_TOKENS = 128  # of one slot, that `copy_rows` moves at once


def grow(cache: KVCache, capacity: int) -> KVCache:
    """Copy the cache into a longer one."""
    more = capacity - cache[0][0].shape[2]
    return jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, 0), (0, more), (0, 0))), cache)


def copy_rows(cache: KVCache, pairs: jax.Array) -> KVCache:
    """Copy the first rows of some slots into others, in place.

    Args:
      cache: the KV cache (donated), or a device's part of it.
      pairs: int32[S, 3] of slot, donor and number of rows; those of zero rows come last. Up to
        `COPIED_TOKENS` - 1 rows more are copied, which no position of the slot looks at.

    Returns:
      The cache.
    """
    size = min(COPIED_TOKENS, cache[0][0].shape[2])

    def copy_pair(number: jax.Array, cache: KVCache) -> KVCache:
        slot, donor, count = pairs[number]

        def copy_piece(piece: jax.Array, cache: KVCache) -> KVCache:
            def copy(leaf: jax.Array) -> jax.Array:
                _, heads, _, depth = leaf.shape
                # Both clip the last piece to the end of the cache alike.
                rows = jax.lax.dynamic_slice(leaf, (donor, 0, piece * size, 0), (1, heads, size, depth))
                return jax.lax.dynamic_update_slice(leaf, rows, (slot, 0, piece * size, 0))

            return jax.tree.map(copy, cache)

        return jax.lax.fori_loop(0, (count + size - 1) // size, copy_piece, cache)

    return jax.lax.fori_loop(0, jnp.sum(pairs[:, 2] > 0, dtype=jnp.int32), copy_pair, cache)


def copy_pages(cache: KVCache, pairs: jax.Array) -> KVCache:
    """Copy pages of a pool, in place.

    Args:
      cache: the pool (donated).
      pairs: int32[S, 2] of a page and the one that becomes its copy, all different; a number beyond the pool
        copies nothing.

    Returns:
      The pool.
    """

    def copy(leaf: jax.Array) -> jax.Array:
        # All are read before any is written: a page that is given away may be the copy of another one.
        return leaf.at[:, pairs[:, 1]].set(jnp.take(leaf, pairs[:, 0], axis=1, mode="clip"), mode="drop")

    return jax.tree.map(copy, cache)
