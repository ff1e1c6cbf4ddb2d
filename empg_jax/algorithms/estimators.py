"""Base estimators bound to the carriers: what a recipe calls to get the advantages of a batch.

A turn estimator takes ``(batch, turn_mask, recipe)`` and returns ``float[N, K]``; a token estimator takes
``(batch, scores, recipe)`` and returns ``float[B, T]``, for methods whose advantage differs inside a turn.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from empg_jax.algorithms.advantages import grpo, grpo_turn_rows, reinforce, rloo
from empg_jax.algorithms.gigpo import gigpo
from empg_jax.algorithms.masking import whiten
from empg_jax.algorithms.returns import backward_sums
from empg_jax.algorithms.segments import center_by_group, turn_slots
from empg_jax.types import Batch, Scores


def _every_turn(advantages: Float[Array, " N"], turn_mask: Bool[Array, "N K"]) -> Float[Array, "N K"]:
    return jnp.broadcast_to(advantages[:, None], turn_mask.shape)


def reinforce_turns(batch: Batch, turn_mask: Bool[Array, "N K"], recipe: Any) -> Float[Array, "N K"]:
    """`reinforce` against the batch mean."""
    return _every_turn(reinforce(batch.returns, trajectory_mask=batch.group_ids >= 0), turn_mask)


def grpo_turns(batch: Batch, turn_mask: Bool[Array, "N K"], recipe: Any) -> Float[Array, "N K"]:
    """`grpo` on episode returns, the same for every turn."""
    advantages = grpo(
        batch.returns, batch.group_ids, scale_by_std=recipe.scale_by_std, singleton=recipe.singleton
    )
    return _every_turn(advantages, turn_mask)


def rloo_turns(batch: Batch, turn_mask: Bool[Array, "N K"], recipe: Any) -> Float[Array, "N K"]:
    """`rloo` on episode returns, the same for every turn."""
    return _every_turn(rloo(batch.returns, batch.group_ids, singleton=recipe.singleton), turn_mask)


def grpo_row_turns(batch: Batch, turn_mask: Bool[Array, "N K"], recipe: Any) -> Float[Array, "N K"]:
    """`grpo_turn_rows`: each turn's score is the episode's return, less the penalty of its own action."""
    scores = _every_turn(batch.returns, turn_mask) - _invalid_penalties(batch, turn_mask, recipe)
    return grpo_turn_rows(
        scores, turn_mask, batch.group_ids, scale_by_std=recipe.scale_by_std, singleton=recipe.singleton
    )


def gigpo_turns(batch: Batch, turn_mask: Bool[Array, "N K"], recipe: Any) -> Float[Array, "N K"]:
    """`gigpo`; a turn's return is reduced by the penalty of its own action, which is not propagated."""
    return gigpo(
        batch.returns,
        batch.turn_returns - _invalid_penalties(batch, turn_mask, recipe),
        batch.anchor_ids,
        turn_mask,
        batch.group_ids,
        omega=recipe.omega,
        scale_by_std=recipe.scale_by_std,
        singleton=recipe.singleton,
    )


def _invalid_penalties(batch: Batch, turn_mask: Bool[Array, "N K"], recipe: Any) -> Float[Array, "N K"]:
    return jnp.where(turn_mask & ~batch.turn_valid, jnp.float32(recipe.invalid_penalty), 0)


def token_reward_to_go(
    rewards: Float[Array, "B T"], slots: Int[Array, "B T"], num_turns: int, gamma: float
) -> Float[Array, "B T"]:
    """Discounted reward-to-go of every sampled token along its trajectory, wherever its rows are packed.

    The tokens are sorted by (trajectory, turn, position), summed backwards with a cut at each trajectory's
    end, and scattered back; a packed neighbour is never reached.

    Args:
      rewards: per token; read under the slots only.
      slots: ``trajectory · K + turn`` of each sampled token, -1 elsewhere (a turn lies in one row).
      num_turns: K.
      gamma: discount per sampled token.
    """
    flat = slots.ravel()
    far = jnp.iinfo(jnp.int32).max
    order = jnp.argsort(jnp.where(flat >= 0, flat, far), stable=True)
    trajectory = jnp.where(flat >= 0, flat // num_turns, -1)[order]
    continues = trajectory == jnp.roll(trajectory, -1)
    continues = continues.at[-1].set(False)
    values = jnp.where(flat >= 0, rewards.ravel(), 0)[order]
    decays = jnp.where(continues, jnp.asarray(gamma, values.dtype), 0)
    sums = backward_sums(values[None], decays[None])[0]
    back = jnp.zeros_like(values).at[order].set(sums).reshape(slots.shape)
    return jnp.where(slots >= 0, back, 0)


def reinforce_pp_tokens(batch: Batch, scores: Scores, recipe: Any) -> Float[Array, "B T"]:
    """REINFORCE++: outcome on the last token, KL in the reward, whitened reward-to-go.

    With ``recipe.group_baseline`` the outcome is first reduced by its group's mean (the baseline form).
    Source: https://arxiv.org/abs/2501.03262.
    """
    num_trajectories, num_turns = batch.turn_returns.shape
    outcomes = batch.returns
    if recipe.group_baseline:
        outcomes, _, _ = center_by_group(outcomes, batch.group_ids, num_trajectories)
    home = jnp.clip(batch.trajectory_ids, 0, num_trajectories - 1)
    slots = turn_slots(batch.loss_mask, batch.trajectory_ids, batch.turn_ids, (num_trajectories, num_turns))
    place = jnp.arange(slots.size, dtype=jnp.int32).reshape(slots.shape)
    last_slot = jnp.full(num_trajectories, -1, jnp.int32).at[home].max(slots)
    in_last_turn = (slots >= 0) & (slots == last_slot[home])
    last_place = jnp.full(num_trajectories, -1, jnp.int32).at[home].max(jnp.where(in_last_turn, place, -1))
    rewards = jnp.where(in_last_turn & (place == last_place[home]), outcomes[home], 0)
    if recipe.reward_kl_coef:
        rewards = rewards - recipe.reward_kl_coef * (scores.old_logprobs - scores.ref_logprobs)
    return whiten(token_reward_to_go(rewards, slots, num_turns, recipe.gamma), slots >= 0)
