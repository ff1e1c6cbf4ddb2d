"""Masks, types and masked statistics, which every estimator is built on.

Conventions of the whole package:

* arrays may be JAX or NumPy; masks may be bool, int or float (non-zero = valid) and change no result's type;
* results have the promoted type of the floating inputs and float32;
* a masked place is overwritten *before* any arithmetic, so junk under a mask (NaN included) is harmless;
* an id of -1 means absent: excluded from every statistic, result 0.

Shapes: ``B`` rows, ``T`` tokens, ``N`` trajectories, ``K`` turns, ``M`` any flat population.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Real, Shaped

Arr = jax.Array | np.ndarray
Scalar = float | int | np.number | jax.Array
# The range of an option: a readable name in signatures, and a check in configurations.
NonNegative = Scalar
Positive = Scalar
Share = Scalar  # in [0, 1]
Portion = Scalar  # in (0, 1]
AboveOne = Scalar
Count = int  # at least 0
Length = int  # at least 1


def as_mask(mask: Shaped[Arr, "..."]) -> Bool[Array, "..."]:
    """Convert a mask of any type to bool (non-zero = valid)."""
    return jnp.asarray(mask).astype(bool)


def as_ids(ids: Shaped[Arr, "..."]) -> Int[Array, "..."]:
    """Convert ids of any integer type to int32."""
    return jnp.asarray(ids).astype(jnp.int32)


def float_type(*arrays: Shaped[Arr, "..."]) -> DTypeLike:
    """Find the type to compute in: the inputs' promoted type, at least float32."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *(jnp.asarray(array) for array in arrays))


def as_floats(*arrays: Real[Arr, "..."]) -> tuple[Float[Array, "..."], ...]:
    """Bring all arrays to one floating type (`float_type`), so strict promotion has nothing to refuse."""
    dtype = float_type(*arrays)
    return tuple(jnp.asarray(array).astype(dtype) for array in arrays)


def check_choice(name: str, value: str, valid: Sequence[str]) -> None:
    """Raise ValueError with the argument's name, its value and its valid choices."""
    if value not in valid:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, valid))}")


def check_shapes(**arrays: Shaped[Arr, "..."]) -> None:
    """Raise ValueError unless all arrays have one shape; users' own JAX settings may broadcast silently."""
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"these arrays must have one shape, got {found}")


def masked_mean(values: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """Average over the valid places; 0 when there are none."""
    count = jnp.sum(mask, dtype=values.dtype)
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(count, 1)


def masked_spread(
    values: Float[Array, "..."], mask: Bool[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """Compute deviations from the mean over the valid places (0 elsewhere) and their variance (ddof 1).

    The values are first shifted by their minimum, so that equal values give zeros exactly.
    """
    low = jnp.min(jnp.where(mask, values, jnp.inf))
    shifted = jnp.where(mask, values, 0) - jnp.where(jnp.any(mask), low, 0)
    deviations = jnp.where(mask, shifted - masked_mean(shifted, mask), 0)
    count = jnp.sum(mask, dtype=values.dtype)
    return deviations, jnp.sum(deviations**2) / jnp.maximum(count - 1, 1)


def whiten(x: Real[Arr, "*shape"], mask: Shaped[Arr, "*shape"]) -> Float[Array, "*shape"]:
    """Scale to mean 0 and variance 1 over the valid places: (x − mean) / sqrt(var + 1e-8), var with ddof 1.

    Args:
      x: any shape.
      mask: same shape; which places count.

    Returns:
      Same shape, 0 off the mask; all 0 when the valid values are equal.
    """
    check_shapes(x=x, mask=mask)
    (x,) = as_floats(x)
    deviations, variance = masked_spread(x, as_mask(mask))
    return deviations / jnp.sqrt(variance + 1e-8)


def next_valid_values(values: Float[Array, "R L"], mask: Bool[Array, "R L"]) -> Float[Array, "R L"]:
    """Find the value at the row's next valid place, across invalid ones; 0 at the last and off the mask.

    Args:
      values: one row per sequence.
      mask: which places exist.
    """
    length = values.shape[1]
    after = next_valid_places(mask)
    found = jnp.take_along_axis(values, jnp.minimum(after, length - 1), axis=1)
    return jnp.where(mask & (after < length), found, 0)


def next_valid_places(mask: Bool[Array, "R L"]) -> Int[Array, "R L"]:
    """Find the column of the row's next valid place after each place; L where there is none.

    Args:
      mask: which places exist.
    """
    length = mask.shape[1]
    places = jnp.where(mask, jnp.arange(length, dtype=jnp.int32)[None, :], length)
    from_here = jax.lax.cummin(places, axis=1, reverse=True)
    return jnp.concatenate([from_here[:, 1:], jnp.full_like(from_here[:, :1], length)], axis=1)


def masked_quantiles(
    values: Float[Array, "..."], mask: Bool[Array, "..."], quantiles: tuple[float, ...]
) -> tuple[Float[Array, ""], ...]:
    """Interpolate quantiles of the valid places (0 when there are none).

    Args:
      values: any shape.
      mask: which places count.
      quantiles: each in [0, 1].

    Returns:
      One scalar for each quantile.
    """
    ordered = jnp.sort(jnp.where(mask, values, jnp.inf).ravel())
    last = jnp.maximum(jnp.sum(mask, dtype=jnp.int32) - 1, 0)
    results = []
    for quantile in quantiles:
        place = last.astype(values.dtype) * quantile
        low = jnp.floor(place)
        left = ordered[low.astype(jnp.int32)]
        right = ordered[jnp.minimum(low.astype(jnp.int32) + 1, last)]
        # With right = left = inf (nothing valid) the difference would be NaN.
        step = jnp.where(right > left, right - left, 0) * (place - low)
        results.append(jnp.where(jnp.any(mask), left + step, 0))
    return tuple(results)
