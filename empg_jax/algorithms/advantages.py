"""Base advantages from episode returns.

All are constants to the gradient. ``group_ids`` lie in [0, N); -1 marks an absent row, which enters no
statistic and gets 0. See `empg_jax.algorithms.masking` for the conventions on types and masks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real, Shaped

from empg_jax.algorithms.masking import (
    Arr,
    Scalar,
    as_floats,
    as_ids,
    as_mask,
    check_choice,
    check_shapes,
    masked_spread,
)
from empg_jax.algorithms.segments import center_by_group, is_rounding

SINGLETONS = ("zero", "raw")
BASELINES = ("batch_mean", "none")
ROW_STATISTICS = ("all", "first", "mean")


def reinforce(
    returns: Real[Arr, " N"],
    *,
    baseline: str = "batch_mean",
    trajectory_mask: Shaped[Arr, " N"] | None = None,
) -> Float[Array, " N"]:
    """Compute REINFORCE: A_i = R_i − b.

    Source: Williams, 1992, https://doi.org/10.1007/BF00992696.

    Args:
      returns: episode returns.
      baseline: b is the ``"batch_mean"`` of the returns, or ``"none"``: 0.
      trajectory_mask: rows that exist; None = all.

    Returns:
      Advantages [N].

    Raises:
      ValueError: for an unknown ``baseline`` or different shapes.
    """
    check_choice("baseline", baseline, BASELINES)
    (returns,) = as_floats(jax.lax.stop_gradient(returns))
    if trajectory_mask is None:
        mask = jnp.ones(returns.shape, bool)
    else:
        check_shapes(returns=returns, trajectory_mask=trajectory_mask)
        mask = as_mask(trajectory_mask)
    if baseline == "none":
        return jnp.where(mask, returns, 0)
    deviations, _ = masked_spread(returns, mask)
    return deviations


def grpo(
    returns: Real[Arr, " N"],
    group_ids: Int[Arr, " N"],
    *,
    scale_by_std: bool = True,
    eps: Scalar = 1e-6,
    singleton: str = "zero",
) -> Float[Array, " N"]:
    """Compute group-relative advantages (GRPO); without the division, Dr. GRPO.

        A_i = (R_i − mean_g) / (std_g + eps),   std with ddof 1

    Sources: GRPO, https://arxiv.org/abs/2402.03300; Dr. GRPO, https://arxiv.org/abs/2503.20783. A group of
    equal returns gives exactly 0.

    Args:
      returns: episode returns.
      group_ids: which trajectories attempted the same task; in [0, N), -1 = absent.
      scale_by_std: divide by the group's standard deviation.
      eps: added to the standard deviation.
      singleton: a group of one gives ``"zero"``, or ``"raw"``: mean 0 and std 1, so the return survives.

    Returns:
      Advantages [N].

    Raises:
      ValueError: for an unknown ``singleton`` or different shapes.
    """
    check_choice("singleton", singleton, SINGLETONS)
    check_shapes(returns=returns, group_ids=group_ids)
    (returns,) = as_floats(jax.lax.stop_gradient(returns))
    ids = as_ids(group_ids)
    advantages, std, count = center_by_group(returns, ids, returns.shape[0])
    if singleton == "raw":
        advantages = jnp.where(count == 1, returns, advantages)
    if scale_by_std:
        advantages = advantages / (jnp.where(count == 1, 1, std) + jnp.asarray(eps, std.dtype))
    return jnp.where(ids >= 0, advantages, 0)


def rloo(
    returns: Real[Arr, " N"], group_ids: Int[Arr, " N"], *, singleton: str = "zero"
) -> Float[Array, " N"]:
    """Subtract a leave-one-out baseline (RLOO).

        A_i = R_i − (1/(G−1)) Σ_{j≠i} R_j = G/(G−1) · (R_i − mean_g)

    Source: https://arxiv.org/abs/2402.14740.

    Args:
      returns: episode returns.
      group_ids: which trajectories attempted the same task; in [0, N), -1 = absent.
      singleton: a group of one gives ``"zero"`` or its ``"raw"`` return.

    Returns:
      Advantages [N].

    Raises:
      ValueError: for an unknown ``singleton`` or different shapes.
    """
    check_choice("singleton", singleton, SINGLETONS)
    check_shapes(returns=returns, group_ids=group_ids)
    (returns,) = as_floats(jax.lax.stop_gradient(returns))
    ids = as_ids(group_ids)
    centered, _, count = center_by_group(returns, ids, returns.shape[0])
    advantages = centered * count / jnp.maximum(count - 1, 1)
    if singleton == "raw":
        advantages = jnp.where(count == 1, returns, advantages)
    return jnp.where(ids >= 0, advantages, 0)


def grpo_turn_rows(
    turn_scores: Real[Arr, "N K"],
    turn_mask: Shaped[Arr, "N K"],
    group_ids: Int[Arr, " N"],
    *,
    scale_by_std: bool = True,
    eps: Scalar = 1e-6,
    singleton: str = "zero",
    rows: str = "all",
) -> Float[Array, "N K"]:
    """Compute GRPO as row-per-step frameworks do: every turn is a row with a score of its own.

        A_it = (s_it − mean_g) / (std_g + eps)

    There each row carries the episode's return, less a penalty if that turn's action was invalid; over all
    rows of the group, long trajectories weigh more. Where the rows of the statistics tie, std counts as 1, so
    that a turn's own penalty stays as large as it is (verl-agent divides it by ``eps``). Source: verl-agent,
    https://github.com/langfengQ/verl-agent.

    Args:
      turn_scores: score of each turn.
      turn_mask: turns that exist.
      group_ids: the task of each trajectory, in [0, N); -1 = absent.
      scale_by_std: divide by the standard deviation (ddof 1).
      eps: added to the standard deviation.
      singleton: a statistic over one row gives ``"zero"`` or the ``"raw"`` score.
      rows: which rows enter mean and std: ``"all"`` turns, or one per trajectory: its ``"first"`` turn or the
        ``"mean"`` of its turns.

    Returns:
      Advantages [N, K], 0 off the mask.

    Raises:
      ValueError: for an unknown choice or different shapes.
    """
    check_choice("singleton", singleton, SINGLETONS)
    check_choice("rows", rows, ROW_STATISTICS)
    check_shapes(turn_scores=turn_scores, turn_mask=turn_mask)
    (scores,) = as_floats(jax.lax.stop_gradient(turn_scores))
    ids = as_ids(group_ids)
    mask = as_mask(turn_mask) & (ids >= 0)[:, None]
    scores = jnp.where(mask, scores, 0)
    size = scores.shape[0]
    if rows == "all":
        row_ids = jnp.where(mask, ids[:, None], -1).ravel()
        advantages, std, count = (
            x.reshape(mask.shape) for x in center_by_group(scores.ravel(), row_ids, size)
        )
    else:
        if rows == "first":
            first = jnp.argmax(mask, axis=1, keepdims=True)
            chosen = jnp.take_along_axis(scores, first, axis=1)
        else:
            # Around the row's own minimum: the mean of equal scores is then that score exactly.
            low = jnp.min(jnp.where(mask, scores, jnp.inf), axis=1, keepdims=True)
            low = jnp.where(jnp.isfinite(low), low, 0)
            turns = jnp.maximum(jnp.sum(mask, axis=1, dtype=scores.dtype, keepdims=True), 1)
            chosen = low + jnp.sum(jnp.where(mask, scores - low, 0), axis=1, keepdims=True) / turns
        present = jnp.where(jnp.any(mask, axis=1), ids, -1)
        deviation, std, count = (x[:, None] for x in center_by_group(chosen[:, 0], present, size))
        advantages = scores - chosen + deviation
    if singleton == "raw":
        advantages = jnp.where(count == 1, scores, advantages)
    else:
        advantages = jnp.where(count == 1, 0, advantages)
    if scale_by_std:  # 0 is the spread of a tie, and of one row
        advantages = advantages / (jnp.where(std == 0, 1, std) + jnp.asarray(eps, std.dtype))
    return jnp.where(mask, advantages, 0)


def has_spread(returns: Real[Arr, " N"], group_ids: Int[Arr, " N"]) -> Bool[Array, " N"]:
    """Mark trajectories whose group has different returns: those that DAPO's dynamic sampling keeps.

    Returns that differ by rounding alone are equal.

    Source: DAPO, https://arxiv.org/abs/2503.14476.

    Args:
      returns: raw episode returns, before any penalty.
      group_ids: in [0, N), -1 = absent.
    """
    (returns,) = as_floats(returns)
    ids = as_ids(group_ids)
    valid, home, size = ids >= 0, jnp.maximum(ids, 0), returns.shape[0]
    low = jax.ops.segment_min(jnp.where(valid, returns, jnp.inf), home, num_segments=size)
    high = jax.ops.segment_max(jnp.where(valid, returns, -jnp.inf), home, num_segments=size)
    return valid & (~is_rounding(low, high))[home]


def overlong_penalty(
    lengths: Real[Arr, "*shape"], *, max_length: int, cache_length: int, factor: Scalar = 1.0
) -> Float[Array, "*shape"]:
    """Compute DAPO's soft overlong shaping, to be added to the returns before the base estimator.

        −factor · clip((len − (L_max − L_cache)) / L_cache, 0, 1)

    It reaches ``−factor`` at ``max_length`` and stays there beyond. Source: DAPO,
    https://arxiv.org/abs/2503.14476, Eq. 13.

    Args:
      lengths: sampled tokens of each trajectory, any shape.
      max_length: L_max in tokens.
      cache_length: L_cache in tokens: the width of the ramp, in (0, max_length].
      factor: the penalty at ``max_length`` and beyond.

    Returns:
      Penalties of that shape, in [−factor, 0].

    Raises:
      ValueError: for a ramp that does not fit.
    """
    if not 0 < cache_length <= max_length:
        raise ValueError(f"cache_length={cache_length} must lie in (0, max_length={max_length}]")
    (lengths,) = as_floats(lengths)
    excess = (lengths - (max_length - cache_length)) / cache_length
    return -jnp.asarray(factor, excess.dtype) * jnp.clip(excess, 0, 1)
