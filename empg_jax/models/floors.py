"""The floors: the logit above which a filter keeps a token, for every token that the learner scores.

The sampler knows which tokens its filter kept; the learner finds them again from its own logits. The head
cannot find them by itself: it has a part of the vocabulary at a time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from empg_jax.models.filtering import TokenFilter, find_reach
from empg_jax.parallel.layout import constrain, gather_weight, num_shards
from empg_jax.types import wide_type


def find_floors(
    hidden: Float[Array, "*M D"],
    weights: Float[Array, "V D"],
    temperature: float,
    token_filter: TokenFilter,
    slab: int,
    mask: Bool[Array, "*M"] | None,
) -> Float[Array, "*M"]:
    """Find the logit that separates kept from dropped tokens, halfway between the two next to it.

    So rounding, which differs between two ways to compute a logit, moves no token to the other side. Some
    tokens at a time are compared with the whole vocabulary, which costs one more product with the output
    embedding. The floors have no gradient.

    Args:
      hidden: normalized final hidden states; on a mesh ``[B T D]`` with rows and time split.
      weights: output embedding, one row per vocabulary entry.
      temperature: divides the logits.
      token_filter: the filter.
      slab: largest number of logits in memory at one time on a device, where one column of tokens fits.
      mask: the tokens whose floors are read; those of the others are arbitrary.

    Returns:
      Floors in the type that logits accumulate in; minus infinity where every token is kept.
    """
    shape, depth, vocab = hidden.shape[:-1], hidden.shape[-1], weights.shape[0]
    rows, time = num_shards("rows"), num_shards("time")
    is_alone = rows * time == 1
    # Every device walks along its own tokens, so that nothing moves between devices.
    count = shape[0] if not is_alone else 1
    grid = (count, time, hidden.size // depth // (count * time))
    states = jax.lax.stop_gradient(hidden).reshape(*grid, depth)
    table = gather_weight(jax.lax.stop_gradient(weights), ("vocab", "embed"))
    filters = jnp.asarray(token_filter, jnp.float32)
    devices = rows * time * num_shards("vocab")
    blocks = _num_blocks(grid[-1], -(-grid[0] * time * grid[-1] * vocab // (slab * devices)))
    used = jnp.int32(blocks)
    if mask is not None and is_alone:
        order = jnp.argsort(jnp.logical_not(mask.reshape(-1)), stable=True)
        states = states[:, :, order]
        used = -(-jnp.sum(mask, dtype=jnp.int32) // (grid[-1] // blocks))
    size = grid[-1] // blocks

    def step(block: Array, floors: Array) -> Array:
        here = jax.lax.dynamic_slice_in_dim(states, block * size, size, axis=2)
        found = _floors_of(constrain(here, "rows", "time", None, None), table, temperature, filters)
        return jax.lax.dynamic_update_slice_in_dim(floors, found, block * size, axis=2)

    wide = wide_type(hidden.dtype)
    floors = jax.lax.fori_loop(jnp.int32(0), used, step, jnp.full(grid, -jnp.inf, wide))
    if mask is not None and is_alone:
        floors = jnp.zeros_like(floors).at[:, :, order].set(floors)
    return floors.reshape(shape)


def _num_blocks(length: int, wanted: int) -> int:
    """Return the smallest divisor of ``length`` that is at least ``wanted``, and at least 16 where it can."""
    return next(n for n in range(min(max(wanted, 16), length), length + 1) if length % n == 0)


def _floors_of(hidden: Array, table: Array, temperature: float, filters: Array) -> Array:
    wide = wide_type(hidden.dtype)
    logits = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=wide)
    logits = constrain(logits * jnp.asarray(1 / temperature, wide), "rows", "time", None, "vocab")
    largest = jnp.max(logits, axis=-1)
    gaps = (largest[..., None] - logits).astype(jnp.float32)
    is_kept = gaps <= find_reach(gaps, filters)[..., None]
    last = jnp.max(jnp.where(is_kept, gaps, jnp.float32(0.0)), axis=-1)
    following = jnp.min(jnp.where(is_kept, jnp.float32(jnp.inf), gaps), axis=-1)
    return largest - ((last + following) / 2).astype(wide)
