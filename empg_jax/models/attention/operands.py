"""The operands of packed attention as one named tuple."""

from __future__ import annotations

from typing import NamedTuple

from jax import Array
from jaxtyping import Float, Int


class Operands(NamedTuple):
    """Queries, keys, values and segment ids of packed rows."""

    queries: Float[Array, "B T H d"]
    keys: Float[Array, "B T K d"]
    values: Float[Array, "B T K d"]
    segment_ids: Int[Array, "B T"]
