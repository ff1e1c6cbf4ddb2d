"""Values of turns, and temporal differences along them: GAGPO without a critic, Turn-PPO with one."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real, Shaped

from empg_jax.algorithms.anchors import anchor_groups
from empg_jax.algorithms.masking import Arr, Scalar, as_floats, as_ids, as_mask, check_choice, check_shapes
from empg_jax.algorithms.returns import discounted_returns, gae
from empg_jax.algorithms.segments import center_by_group, segment_means
from empg_jax.algorithms.timeline import last_turns

NORMALIZE = ("group", "none")
NOISE = 1e-6  # of a difference of values, relative to them


def gagpo(
    turn_rewards: Real[Arr, "N K"],
    anchor_ids: Int[Arr, "N K"],
    turn_mask: Shaped[Arr, "N K"],
    group_ids: Int[Arr, " N"],
    *,
    gamma: Scalar = 0.95,
    lam: Scalar = 0.8,
    normalize: str = "group",
    eps: Scalar = 1e-6,
) -> Float[Array, "N K"]:
    """Compute GAGPO: generalized advantages of turns on the mean return of equal observations.

        V(s) = mean discounted return of the group's visits of s;   δ_t = r_t + γ V_next − V_t
        A_t = δ_t + γ λ A_next,   then (A − mean_g) / (std_g + eps),   std with ddof 1

    An observation that nobody else met has the turn's own return as its value. The value after the end of an
    episode is 0. γ and λ were not found in the source; these are this package's. Source:
    https://arxiv.org/abs/2605.13217.

    Args:
      turn_rewards: the reward of each turn; read under the mask only.
      anchor_ids: observation key of each turn; equal ids = equal observation, -1 = none.
      turn_mask: turns that exist.
      group_ids: the task of each trajectory, in [0, N); -1 = absent.
      gamma: γ, discount per turn.
      lam: λ.
      normalize: over the turns of the task (``"group"``), or ``"none"``.
      eps: added to the standard deviation.

    Returns:
      Advantages [N, K], 0 off the mask.

    Raises:
      ValueError: for an unknown ``normalize`` or different shapes.
    """
    check_choice("normalize", normalize, NORMALIZE)
    check_shapes(turn_rewards=turn_rewards, anchor_ids=anchor_ids, turn_mask=turn_mask)
    (rewards,) = as_floats(jax.lax.stop_gradient(turn_rewards))
    ids = as_ids(group_ids)
    mask = as_mask(turn_mask) & (ids >= 0)[:, None]
    later = discounted_returns(rewards, mask, gamma=gamma)
    nodes = anchor_groups(as_ids(anchor_ids), mask, ids)
    values = jnp.where(nodes >= 0, segment_means(later, nodes), later)
    advantages, _ = gae(rewards, values, mask, gamma=gamma, lam=lam)
    # Where nobody else met the observations all differences are 0: rounding must not be scaled up.
    advantages = jnp.where(jnp.abs(advantages) <= NOISE * jnp.maximum(jnp.abs(values), 1), 0, advantages)
    if normalize == "none":
        return advantages
    members = jnp.where(mask, ids[:, None], -1).ravel()
    gain, std, _ = center_by_group(advantages.ravel(), members, ids.size)
    return (gain / (std + jnp.asarray(eps, std.dtype))).reshape(mask.shape)


def turn_gae(
    turn_rewards: Real[Arr, "N K"],
    turn_values: Real[Arr, "N K"],
    turn_mask: Shaped[Arr, "N K"],
    *,
    gamma: Scalar = 0.99,
    lam: Scalar = 0.9,
    bootstrap: Real[Arr, " N"] | None = None,
) -> tuple[Float[Array, "N K"], Float[Array, "N K"]]:
    """Estimate generalized advantages with the turn as the action (Turn-PPO).

        δ_t = r_t + γ V_{t+1} − V_t,   A_t = δ_t + γ λ A_{t+1},   target_t = A_t + V_t

    Source: Turn-PPO, https://arxiv.org/abs/2512.17008.

    Args:
      turn_rewards: the reward of each turn; read under the mask only.
      turn_values: the critic's value of the state before each turn; read under the mask only.
      turn_mask: turns that exist.
      gamma: γ, discount per turn.
      lam: λ.
      bootstrap: value of the state that a limit cut the episode in, 0 where the episode ended; None = 0.

    Returns:
      ``(advantages, targets)``, each [N, K], 0 off the mask; not whitened.

    Raises:
      ValueError: for different shapes.
    """
    check_shapes(turn_rewards=turn_rewards, turn_values=turn_values, turn_mask=turn_mask)
    rewards, values = as_floats(turn_rewards, turn_values)
    mask = as_mask(turn_mask)
    if bootstrap is not None:
        after = jnp.asarray(gamma, rewards.dtype) * as_floats(bootstrap)[0].astype(rewards.dtype)
        rewards = rewards + jnp.where(last_turns(mask), after[:, None], 0)
    return gae(rewards, values, mask, gamma=gamma, lam=lam)
