"""BEACON: subgoals that the environment verifies cut a trajectory into segments."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real, Shaped

from empg_jax.algorithms.advantages import grpo
from empg_jax.algorithms.masking import Arr, Scalar, as_floats, as_ids, as_mask, check_shapes
from empg_jax.algorithms.returns import backward_sums
from empg_jax.algorithms.segments import center_by_group


def beacon(
    returns: Real[Arr, " N"],
    milestones: Shaped[Arr, "N K"],
    turn_mask: Shaped[Arr, "N K"],
    group_ids: Int[Arr, " N"],
    *,
    gamma: Scalar = 0.95,
    weight: Scalar = 1.0,
    scale: Scalar = 10.0,
    scale_by_std: bool = False,
    eps: Scalar = 1e-6,
) -> Float[Array, "N K"]:
    """Compute milestone credit (BEACON).

        x_it = c γ^(t' − t) where turn t' ≥ t reaches the next milestone, else 0
        A_it = (R_i − mean_g) + w (x_it − mean over the turns of the task after as many milestones)

    A turn is compared with the turns of other attempts that stand between the same milestones. Source:
    https://arxiv.org/abs/2605.06078.

    Args:
      returns: episode returns, penalties taken off.
      milestones: turns that reached a milestone.
      turn_mask: turns that exist.
      group_ids: the task of each trajectory, in [0, N); -1 = absent.
      gamma: γ, discount per turn before a milestone.
      weight: w, weight of the segments' part.
      scale: c, the worth of a milestone; that of a success where returns are 0 or 10.
      scale_by_std: divide the segments' part by its standard deviation (ddof 1).
      eps: added to that standard deviation.

    Returns:
      Advantages [N, K], 0 off the mask.

    Raises:
      ValueError: for different shapes.
    """
    check_shapes(milestones=milestones, turn_mask=turn_mask)
    (returns,) = as_floats(jax.lax.stop_gradient(returns))
    ids = as_ids(group_ids)
    mask = as_mask(turn_mask) & (ids >= 0)[:, None]
    reached = as_mask(milestones) & mask
    decays = jnp.where(mask, jnp.where(reached, 0, jnp.asarray(gamma, returns.dtype)), 1)
    worth = backward_sums(jnp.where(reached, jnp.asarray(scale, returns.dtype), 0), decays)
    before = jnp.cumsum(reached, axis=1, dtype=jnp.int32) - reached.astype(jnp.int32)
    lengths = mask.shape[1] + 1
    members = jnp.where(mask, ids[:, None] * lengths + before, -1).ravel()
    gain, std, _ = center_by_group(worth.ravel(), members, ids.size * lengths)
    if scale_by_std:
        gain = gain / (std + jnp.asarray(eps, std.dtype))
    episode = grpo(returns, ids, scale_by_std=False)[:, None]
    return jnp.where(mask, episode + jnp.asarray(weight, gain.dtype) * gain.reshape(mask.shape), 0)
