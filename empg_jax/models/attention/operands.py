"""What attention works on, in one piece."""

from __future__ import annotations

from typing import NamedTuple

from jax import Array
from jaxtyping import Float, Int


class Operands(NamedTuple):
    """Queries, keys and values of packed rows; tokens see earlier ones of their own segment only."""

    queries: Float[Array, "B T H d"]
    keys: Float[Array, "B T K d"]
    values: Float[Array, "B T K d"]
    segment_ids: Int[Array, "B T"]
