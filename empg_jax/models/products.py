"""Products of a few rows with a large matrix, arranged for the compiler of the platform."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def multiply_transposed(
    rows: Float[Array, "*batch M D"], matrix: Float[Array, "*batch N D"], dtype: Any = None, few: int = 64
) -> Float[Array, "*batch M N"]:
    """Compute ``rows @ matrix.T``, fast where there are few rows.

    XLA:CPU rearranges the second operand of every product. With the rows of a decode step that costs more
    than the product itself if it is the matrix, so there the rows are made the second operand.

    Args:
      rows: the rows.
      matrix: has as many columns as the rows.
      dtype: type of the result; None for that of the operands.
      few: number of rows up to which they are the second operand on a CPU.
    """
    many = functools.partial(jnp.einsum, "...md,...nd->...mn", preferred_element_type=dtype)
    if rows.shape[-2] > few:
        return many(rows, matrix)
    return jax.lax.platform_dependent(
        rows, matrix, cpu=functools.partial(_matrix_first, dtype=dtype), default=many
    )


def _matrix_first(rows: Array, matrix: Array, dtype: Any) -> Array:
    # The barrier keeps XLA from folding the transposition back into the product.
    product = jnp.einsum("...nd,...md->...nm", matrix, rows, preferred_element_type=dtype)
    return jnp.swapaxes(jax.lax.optimization_barrier(product), -1, -2)
