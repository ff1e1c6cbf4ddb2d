"""The operands of packed attention as one named tuple, and the scale of queries."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


class Operands(NamedTuple):
    """Queries, keys, values and segment ids of packed rows."""

    queries: Float[Array, "B T H d"]
    keys: Float[Array, "B T K d"]
    values: Float[Array, "B T K d"]
    segment_ids: Int[Array, "B T"]


def scale(queries: Array) -> Array:
    """Divide queries by the root of their size, for kernels that do not."""
    return (queries.astype(jnp.float32) * jnp.float32(queries.shape[-1] ** -0.5)).astype(queries.dtype)
