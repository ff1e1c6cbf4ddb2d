"""Base advantages from episode returns: one number per trajectory.

All are constants to the gradient. ``group_ids`` lie in [0, N); -1 marks an absent row, which enters no statistic
and gets 0. See `empg_jax.algorithms.masking` for the conventions on types and masks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real

from empg_jax.algorithms.masking import (
    Arr,
    Scalar,
    as_floats,
    as_ids,
    center_by_group,
    check_choice,
    check_shapes,
)

SINGLETONS = ("zero", "raw")


def _singleton_value(
    returns: Float[Array, " M"], centered: Float[Array, " M"], singleton: str
) -> Float[Array, " M"]:
    """What replaces the (always zero) deviation of a group of one."""
    return returns if singleton == "raw" else centered


def grpo(
    returns: Real[Arr, " N"],
    group_ids: Int[Arr, " N"],
    *,
    scale_by_std: bool = True,
    eps: Scalar = 1e-6,
    singleton: str = "zero",
) -> Float[Array, " N"]:
    """Group-relative advantages (GRPO); without the division, Dr. GRPO.

        A_i = (R_i − mean_g) / (std_g + eps),   std with ddof 1

    Sources: GRPO, https://arxiv.org/abs/2402.03300; Dr. GRPO, https://arxiv.org/abs/2503.20783. A group of equal
    returns gives exactly 0.

    Args:
      returns: episode returns.
      group_ids: which trajectories attempted the same task; in [0, N), -1 = absent.
      scale_by_std: divide by the group's standard deviation.
      eps: added to the standard deviation.
      singleton: a group of one gives ``"zero"``, or ``"raw"``: mean 0 and std 1, so the return survives (verl).

    Returns:
      Advantages [N].

    Raises:
      ValueError: for an unknown ``singleton`` or different shapes.
    """
    check_choice("singleton", singleton, SINGLETONS)
    check_shapes(returns=returns, group_ids=group_ids)
    (returns,) = as_floats(jax.lax.stop_gradient(returns))
    ids = as_ids(group_ids)
    centered, std, count = center_by_group(returns, ids, returns.shape[0])
    alone = count == 1
    advantages = jnp.where(alone, _singleton_value(returns, centered, singleton), centered)
    if scale_by_std:
        advantages = advantages / (jnp.where(alone, 1, std) + jnp.asarray(eps, std.dtype))
    return jnp.where(ids >= 0, advantages, 0)


def rloo(
    returns: Real[Arr, " N"], group_ids: Int[Arr, " N"], *, singleton: str = "zero"
) -> Float[Array, " N"]:
    """Leave-one-out baseline (RLOO).

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
    advantages = jnp.where(count == 1, _singleton_value(returns, centered, singleton), advantages)
    return jnp.where(ids >= 0, advantages, 0)
