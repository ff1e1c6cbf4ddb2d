"""Masks, ids and segments: the ground that every estimator stands on.

Conventions of the whole package:

* arrays may be JAX or NumPy; masks may be bool, int or float (non-zero = valid) and never change a result's type;
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


def as_mask(mask: Shaped[Arr, "..."]) -> Bool[Array, "..."]:
    """A mask of any type as bool (non-zero = valid)."""
    return jnp.asarray(mask).astype(bool)


def as_ids(ids: Shaped[Arr, "..."]) -> Int[Array, "..."]:
    """Ids of any integer type as int32."""
    return jnp.asarray(ids).astype(jnp.int32)


def float_type(*arrays: Shaped[Arr, "..."]) -> DTypeLike:
    """The type to compute in: the inputs' promoted type, at least float32."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *(jnp.asarray(array) for array in arrays))


def as_floats(*arrays: Real[Arr, "..."]) -> tuple[Float[Array, "..."], ...]:
    """All arrays in one floating type (`float_type`), so that strict promotion has nothing to refuse."""
    dtype = float_type(*arrays)
    return tuple(jnp.asarray(array).astype(dtype) for array in arrays)


def check_choice(name: str, value: str, valid: Sequence[str]) -> None:
    """Raises ValueError naming the argument, what it got and what it takes."""
    if value not in valid:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, valid))}")


def check_shapes(**arrays: Shaped[Arr, "..."]) -> None:
    """Raises ValueError unless all arrays have one shape; users' own JAX settings may broadcast silently."""
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            "these arrays must have one shape: " + ", ".join(f"{n} {s}" for n, s in shapes.items())
        )


def masked_mean(values: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """Mean over the valid places; 0 when there are none."""
    count = jnp.sum(mask, dtype=values.dtype)
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(count, 1)


def masked_quantiles(
    values: Float[Array, "..."], mask: Bool[Array, "..."], quantiles: tuple[float, ...]
) -> tuple[Float[Array, ""], ...]:
    """Linearly interpolated quantiles of the valid places (0 when there are none).

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


def center_by_group(
    values: Real[Arr, " M"], ids: Int[Array, " M"], num_groups: int
) -> tuple[Float[Array, " M"], Float[Array, " M"], Float[Array, " M"]]:
    """Deviations from the group mean, with the group's spread and size.

    Each group is first shifted by its own minimum: a group of equal values gives zeros *exactly*, whatever the
    values (a float mean of equal numbers need not equal them), and large offsets cost no precision.

    Args:
      values: one value per member.
      ids: the group of each member in [0, num_groups); -1 = absent.
      num_groups: static bound of the ids.

    Returns:
      ``(deviations, std, count)``, each [M]: deviation from the mean, standard deviation (ddof 1, 0 for a
      group of one) and size of the member's group; 0 for absent members.
    """
    (values,) = as_floats(values)
    valid = ids >= 0
    home = jnp.where(valid, ids, 0)

    def total(x: Float[Array, " M"]) -> Float[Array, " M"]:
        sums = jax.ops.segment_sum(jnp.where(valid, x, 0), home, num_segments=num_groups)
        return jnp.where(valid, sums[home], 0)

    low = jax.ops.segment_min(jnp.where(valid, values, jnp.inf), home, num_segments=num_groups)[home]
    shifted = jnp.where(valid, values, 0) - jnp.where(valid, low, 0)
    count = total(jnp.ones_like(values))
    deviations = jnp.where(valid, shifted - total(shifted) / jnp.maximum(count, 1), 0)
    variance = total(deviations**2) / jnp.maximum(count - 1, 1)
    return deviations, jnp.sqrt(variance), count


def rank_ids(ids: Int[Array, "..."]) -> Int[Array, "..."]:
    """Arbitrary ids as ids in [0, size): equal stay equal, different stay different, -1 stays -1.

    The new id is the place of the first equal one in sorted order, so one sort does it and no pairwise
    comparison is ever built.

    Args:
      ids: arbitrary int32 of any shape; -1 = absent.
    """
    flat = ids.ravel()
    places = jnp.searchsorted(jnp.sort(flat), flat).astype(jnp.int32)
    return jnp.where(ids >= 0, places.reshape(ids.shape), -1)


def _turn_slots(
    loss_mask: Shaped[Arr, "B T"],
    trajectory_ids: Int[Arr, "B T"],
    turn_ids: Int[Arr, "B T"],
    shape: tuple[int, int],
) -> Int[Array, "B T"]:
    """The cell ``trajectory * K + turn`` of each token's turn; -1 off the mask or outside the table."""
    num_trajectories, num_turns = shape
    trajectories, turns = as_ids(trajectory_ids), as_ids(turn_ids)
    inside = (trajectories >= 0) & (trajectories < num_trajectories) & (turns >= 0) & (turns < num_turns)
    return jnp.where(as_mask(loss_mask) & inside, trajectories * num_turns + turns, -1)


def count_turn_tokens(
    loss_mask: Shaped[Arr, "B T"],
    trajectory_ids: Int[Arr, "B T"],
    turn_ids: Int[Arr, "B T"],
    *,
    num_trajectories: int,
    num_turns: int,
) -> Int[Array, "N K"]:
    """How many sampled tokens each turn has (arguments as in `compute_turn_entropies`)."""
    slots = _turn_slots(loss_mask, trajectory_ids, turn_ids, (num_trajectories, num_turns)).ravel()
    ones = (slots >= 0).astype(jnp.int32)
    counts = jax.ops.segment_sum(ones, jnp.maximum(slots, 0), num_segments=num_trajectories * num_turns)
    return counts.reshape(num_trajectories, num_turns)


def compute_turn_entropies(
    entropies: Real[Arr, "B T"],
    loss_mask: Shaped[Arr, "B T"],
    trajectory_ids: Int[Arr, "B T"],
    turn_ids: Int[Arr, "B T"],
    *,
    num_trajectories: int,
    num_turns: int,
) -> tuple[Float[Array, "N K"], Bool[Array, "N K"]]:
    """Mean entropy of each turn over its sampled tokens: H_it = (1/n_it) Σ_j h_itj.

    It serves any per-token stream that wants a mean over the turn. No gradient flows through it.

    Args:
      entropies: token entropies in nats.
      loss_mask: tokens that the policy sampled; others are not read.
      trajectory_ids: in [0, num_trajectories).
      turn_ids: in [0, num_turns). Tokens outside the table belong to no turn.
      num_trajectories: N, static.
      num_turns: K, static.

    Returns:
      ``(turn_entropies, turn_mask)``: float [N, K], 0 where a turn has no token; bool [N, K], turns that have one.
    """
    check_shapes(entropies=entropies, loss_mask=loss_mask, trajectory_ids=trajectory_ids, turn_ids=turn_ids)
    (entropies,) = as_floats(jax.lax.stop_gradient(entropies))
    table = (num_trajectories, num_turns)
    slots = _turn_slots(loss_mask, trajectory_ids, turn_ids, table)
    counts = count_turn_tokens(
        loss_mask, trajectory_ids, turn_ids, num_trajectories=num_trajectories, num_turns=num_turns
    )
    kept = jnp.where(slots >= 0, entropies, 0).ravel()
    sums = jax.ops.segment_sum(kept, jnp.maximum(slots, 0).ravel(), num_segments=num_trajectories * num_turns)
    return sums.reshape(table) / jnp.maximum(counts, 1).astype(sums.dtype), counts > 0


def turns_to_tokens(
    values: Real[Arr, "N K"],
    loss_mask: Shaped[Arr, "B T"],
    trajectory_ids: Int[Arr, "B T"],
    turn_ids: Int[Arr, "B T"],
) -> Float[Array, "B T"]:
    """Gives every sampled token its turn's value; 0 off the mask. The inverse of `compute_turn_entropies`.

    Args:
      values: one value per turn.
      loss_mask: tokens that the policy sampled.
      trajectory_ids: row of the table for each token.
      turn_ids: column of the table for each token.
    """
    check_shapes(loss_mask=loss_mask, trajectory_ids=trajectory_ids, turn_ids=turn_ids)
    (values,) = as_floats(values)
    slots = _turn_slots(loss_mask, trajectory_ids, turn_ids, (values.shape[0], values.shape[1]))
    return jnp.where(slots >= 0, values.ravel()[jnp.maximum(slots, 0)], 0)
