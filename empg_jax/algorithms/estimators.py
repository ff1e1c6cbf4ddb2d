"""Base estimators bound to the carriers: what a recipe calls to get the advantages of a batch.

A turn estimator takes ``(batch, turn_mask, recipe)`` and returns ``float[N, K]``; a token estimator takes
``(batch, scores, recipe)`` and returns ``float[B, T]``, for methods whose advantage differs inside a turn.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from empg_jax.algorithms.advantages import grpo, grpo_turn_rows, reinforce, rloo
from empg_jax.algorithms.gigpo import gigpo
from empg_jax.algorithms.masking import whiten
from empg_jax.algorithms.returns import discounted_returns, gae
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


class Line(NamedTuple):
    """The sampled tokens of a batch in one row ``[1, B·T]``, trajectory by trajectory, wherever they stand.

    Functions along time run on it and never reach a packed neighbour; no length has to be known beforehand.
    """

    order: Int[Array, " M"]
    mask: Bool[Array, "1 M"]
    ends: Bool[Array, "1 M"]

    def gather(self, values: Float[Array, "B T"]) -> Float[Array, "1 M"]:
        """Tokens as a line."""
        return values.ravel()[self.order][None]

    def scatter(self, line: Float[Array, "1 M"], slots: Int[Array, "B T"]) -> Float[Array, "B T"]:
        """A line back to its tokens; 0 elsewhere."""
        back = jnp.zeros_like(line[0]).at[self.order].set(line[0]).reshape(slots.shape)
        return jnp.where(slots >= 0, back, 0)


def make_line(slots: Int[Array, "B T"], num_turns: int) -> Line:
    """Sorts tokens by (trajectory, turn, position).

    Args:
      slots: ``trajectory · K + turn`` of each sampled token, -1 elsewhere (a turn lies in one row).
      num_turns: K.
    """
    flat = slots.ravel()
    order = jnp.argsort(jnp.where(flat >= 0, flat, jnp.iinfo(jnp.int32).max), stable=True)
    mask = (flat >= 0)[order]
    trajectory = jnp.where(mask, flat[order] // num_turns, -1)
    ends = (trajectory != jnp.roll(trajectory, -1)).at[-1].set(True)
    return Line(order, mask[None], (ends & mask)[None])


def token_reward_to_go(
    rewards: Float[Array, "B T"], slots: Int[Array, "B T"], num_turns: int, gamma: float
) -> Float[Array, "B T"]:
    """Discounted reward-to-go of every sampled token along its trajectory, wherever its rows are packed.

    Args:
      rewards: per token; read under the slots only.
      slots: as in `make_line`.
      num_turns: K.
      gamma: discount per sampled token.
    """
    line = make_line(slots, num_turns)
    sums = discounted_returns(line.gather(rewards), line.mask, gamma=gamma, ends=line.ends)
    return line.scatter(sums, slots)


def token_rewards(
    batch: Batch, scores: Scores, outcomes: Float[Array, " N"], recipe: Any
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
    """The outcome on a trajectory's last sampled token, less the KL to the reference on each.

    Args:
      batch: where the tokens stand.
      scores: log-probs of policy and reference.
      outcomes: what each trajectory is worth.
      recipe: ``reward_kl_coef``.

    Returns:
      The rewards, and the slots of the tokens (`make_line`).
    """
    num_trajectories, num_turns = batch.turn_returns.shape
    home = jnp.clip(batch.trajectory_ids, 0, num_trajectories - 1)
    slots = turn_slots(batch.loss_mask, batch.trajectory_ids, batch.turn_ids, (num_trajectories, num_turns))
    place = jnp.arange(slots.size, dtype=jnp.int32).reshape(slots.shape)
    last_slot = jnp.full(num_trajectories, -1, jnp.int32).at[home].max(slots)
    in_last_turn = (slots >= 0) & (slots == last_slot[home])
    last_place = jnp.full(num_trajectories, -1, jnp.int32).at[home].max(jnp.where(in_last_turn, place, -1))
    rewards = jnp.where(in_last_turn & (place == last_place[home]), outcomes[home], 0)
    if recipe.reward_kl_coef:
        rewards = rewards - recipe.reward_kl_coef * (scores.old_logprobs - scores.ref_logprobs)
    return rewards, slots


def reinforce_pp_tokens(batch: Batch, scores: Scores, recipe: Any) -> Float[Array, "B T"]:
    """REINFORCE++: outcome on the last token, KL in the reward, whitened reward-to-go.

    With ``recipe.group_baseline`` the outcome is first reduced by its group's mean (the baseline form).
    Source: https://arxiv.org/abs/2501.03262.
    """
    num_trajectories, num_turns = batch.turn_returns.shape
    outcomes = batch.returns
    if recipe.group_baseline:
        outcomes, _, _ = center_by_group(outcomes, batch.group_ids, num_trajectories)
    rewards, slots = token_rewards(batch, scores, outcomes, recipe)
    return whiten(token_reward_to_go(rewards, slots, num_turns, recipe.gamma), slots >= 0)


def ppo_gae(
    batch: Batch, scores: Scores, recipe: Any
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Int[Array, "B T"]]:
    """`gae` along every trajectory: advantages, the critic's targets, slots of the tokens.

    Raises:
      ValueError: the scores hold no values.
    """
    if scores.values is None:
        raise ValueError("this algorithm has a critic: scores.values must hold its values before the update")
    rewards, slots = token_rewards(batch, scores, batch.returns, recipe)
    line = make_line(slots, batch.turn_returns.shape[1])
    streams = (line.gather(rewards), line.gather(scores.values), line.mask)
    found = gae(*streams, gamma=recipe.gamma, lam=recipe.critic.lam, ends=line.ends)
    advantages, targets = (line.scatter(stream, slots) for stream in found)
    return advantages, targets, slots


def ppo_tokens(batch: Batch, scores: Scores, recipe: Any) -> Float[Array, "B T"]:
    """PPO: generalised advantages, whitened over the batch. Source: https://arxiv.org/abs/1707.06347."""
    advantages, _, slots = ppo_gae(batch, scores, recipe)
    return whiten(advantages, slots >= 0)


def ppo_value_targets(batch: Batch, scores: Scores, recipe: Any) -> Float[Array, "B T"]:
    """What PPO's critic learns: advantage (not whitened) + value. Compiled, it shares the work above."""
    return ppo_gae(batch, scores, recipe)[1]
