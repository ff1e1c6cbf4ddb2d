"""Matrix products whose weight gradient comes out in a layout that the platform multiplies fast."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def project(
    inputs: Float[Array, "*batch D"],
    kernel: Float[Array, "D E"],
    dimension_numbers: Any = None,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Float[Array, "*batch E"]:
    """``inputs @ kernel``; stands in for ``lax.dot_general`` in `flax.linen.Dense`.

    The automatic gradient of the kernel is a product of two transposed matrices, which XLA:CPU computes
    from a physically transposed copy of the output's gradient, with a slower routine.

    Args:
      inputs: activations.
      kernel: the weights, in the type of the inputs.
      dimension_numbers: what Dense asks for; always the contraction of the last with the first axis.
      precision: not supported.
      preferred_element_type: not supported.

    Returns:
      The product, in the type of the inputs.
    """
    if precision is not None or preferred_element_type is not None:
        raise ValueError("project has one precision: the type of its inputs")
    return _project(inputs, kernel)


@jax.custom_vjp
def _project(inputs: Array, kernel: Array) -> Array:
    return inputs @ kernel


def _forward(inputs: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return inputs @ kernel, (inputs, kernel)


def _backward(residuals: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    inputs, kernel = residuals
    d_inputs = jnp.einsum("...e,de->...d", slope, kernel)
    rows = inputs.reshape(-1, inputs.shape[-1]), slope.reshape(-1, slope.shape[-1])
    d_kernel = jax.lax.platform_dependent(*rows, cpu=_transposed_first, default=_contract_rows)
    return d_inputs, d_kernel


def _contract_rows(inputs: Array, slope: Array) -> Array:
    return jnp.einsum("md,me->de", inputs, slope)


def _transposed_first(inputs: Array, slope: Array) -> Array:
    # The barrier keeps XLA from folding the transposition back into the product.
    return jax.lax.optimization_barrier(inputs.T) @ slope


_project.defvjp(_forward, _backward)
