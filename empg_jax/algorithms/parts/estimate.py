"""Estimators: base advantages of turns, or of tokens where they differ inside a turn."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from empg_jax.algorithms import advantages, anchors, returns
from empg_jax.algorithms.contract import TokenCredit, Worth
from empg_jax.algorithms.masking import NonNegative, Portion, Positive, Share, check_choice, whiten
from empg_jax.algorithms.part import Part, default_of
from empg_jax.algorithms.segments import center_by_group, turn_slots
from empg_jax.algorithms.timeline import last_turns, make_line, place_turn_values, token_reward_to_go
from empg_jax.types import Batch, Scores


def _every_turn(values: Float[Array, " N"], worth: Worth) -> Float[Array, "N K"]:
    return jnp.broadcast_to(values[:, None], worth.mask.shape)


def reinforce(
    *, baseline: Literal["batch_mean", "none"] = default_of(advantages.reinforce, "baseline")
) -> Part:
    """Bind `reinforce` on episode returns.

    Args:
      baseline: Baseline that reinforce subtracts from a return.
    """
    check_choice("baseline", baseline, advantages.BASELINES)

    def estimate(batch: Batch, scores: Scores, worth: Worth) -> Float[Array, "N K"]:
        present = batch.group_ids >= 0
        return _every_turn(
            advantages.reinforce(worth.returns, baseline=baseline, trajectory_mask=present), worth
        )

    return Part("reinforce", {"baseline": baseline}, estimate)


def rloo(*, singleton: Literal["zero", "raw"] = default_of(advantages.rloo, "singleton")) -> Part:
    """Bind `rloo` on episode returns.

    Args:
      singleton: Advantage of a group of one.
    """
    check_choice("singleton", singleton, advantages.SINGLETONS)

    def estimate(batch: Batch, scores: Scores, worth: Worth) -> Float[Array, "N K"]:
        return _every_turn(advantages.rloo(worth.returns, batch.group_ids, singleton=singleton), worth)

    return Part("rloo", {"singleton": singleton}, estimate)


def grpo(
    *,
    scale_by_std: bool = default_of(advantages.grpo, "scale_by_std"),
    eps: Positive = default_of(advantages.grpo, "eps"),
    singleton: Literal["zero", "raw"] = default_of(advantages.grpo, "singleton"),
) -> Part:
    """Bind `grpo` on episode returns, the same for every turn.

    Args:
      scale_by_std: Divide group advantages by the group's standard deviation.
      eps: Added to a group's standard deviation, where scale_by_std is on.
      singleton: Advantage of a group of one.
    """
    options: dict[str, Any] = dict(locals())
    check_choice("singleton", singleton, advantages.SINGLETONS)

    def estimate(batch: Batch, scores: Scores, worth: Worth) -> Float[Array, "N K"]:
        return _every_turn(advantages.grpo(worth.returns, batch.group_ids, **options), worth)

    return Part("grpo", options, estimate)


def grpo_turn_rows(
    *,
    scale_by_std: bool = default_of(advantages.grpo_turn_rows, "scale_by_std"),
    eps: Positive = default_of(advantages.grpo_turn_rows, "eps"),
    singleton: Literal["zero", "raw"] = default_of(advantages.grpo_turn_rows, "singleton"),
    rows: Literal["all", "first", "mean"] = default_of(advantages.grpo_turn_rows, "rows"),
) -> Part:
    """Bind `grpo_turn_rows`: a turn's score is the episode's return less the penalty of its own action.

    Args:
      scale_by_std: Divide group advantages by the group's standard deviation.
      eps: Added to a group's standard deviation, where scale_by_std is on.
      singleton: Advantage of a group of one.
      rows: Turns that enter the statistics of grpo_turn_rows, or one row per episode (its first, its mean).
    """
    options: dict[str, Any] = dict(locals())
    check_choice("singleton", singleton, advantages.SINGLETONS)
    check_choice("rows", rows, advantages.ROW_STATISTICS)

    def estimate(batch: Batch, scores: Scores, worth: Worth) -> Float[Array, "N K"]:
        return advantages.grpo_turn_rows(worth.turn_scores, worth.mask, batch.group_ids, **options)

    return Part("grpo_turn_rows", options, estimate)


def discounted_turns(worth: Worth, gamma: NonNegative) -> Float[Array, "N K"]:
    """Discount reward-to-go by turns, each less the penalty of its own action, which is not propagated."""
    sums = returns.discounted_returns(worth.turn_rewards, worth.mask, gamma=gamma)
    return jnp.where(worth.mask, sums - worth.turn_penalties, 0)


def gigpo(
    *,
    omega: NonNegative = default_of(anchors.gigpo, "omega"),
    turn_gamma: Share = 0.95,
    scale_by_std: bool = default_of(anchors.gigpo, "scale_by_std"),
    eps: Positive = default_of(anchors.gigpo, "eps"),
    singleton: Literal["zero", "raw"] = default_of(anchors.gigpo, "singleton"),
    statistics: Literal["trajectories", "step_rows"] = default_of(anchors.gigpo, "statistics"),
    anchor_similarity: Portion = 1.0,
) -> Part:
    """Bind `gigpo` on episode scores and discounted returns of turns.

    Args:
      omega: Weight of GiGPO's step part.
      turn_gamma: Discount per turn of step returns, milestones and temporal differences of turns.
      scale_by_std: Divide group advantages by the group's standard deviation.
      eps: Added to a group's standard deviation, where scale_by_std is on.
      singleton: Advantage of a group of one.
      statistics: Entries of the statistics of GiGPO's episode part: episodes, or all turns (verl-agent).
      anchor_similarity: Observations at least this alike (difflib ratio) are one anchor; 1 is equal ones.
    """
    options: dict[str, Any] = dict(locals())
    check_choice("singleton", singleton, advantages.SINGLETONS)
    check_choice("statistics", statistics, anchors.STATISTICS)
    kept = {key: value for key, value in options.items() if key not in ("turn_gamma", "anchor_similarity")}

    def estimate(batch: Batch, scores: Scores, worth: Worth) -> Float[Array, "N K"]:
        return anchors.gigpo(
            worth.returns,
            discounted_turns(worth, turn_gamma),
            batch.anchor_ids,
            worth.mask,
            batch.group_ids,
            turn_scores=worth.turn_scores,
            **kept,
        )

    return Part("gigpo", options, estimate)


def token_rewards(
    batch: Batch, scores: Scores, turn_rewards: Float[Array, "N K"], reward_kl_coef: NonNegative
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
    """Put each turn's reward on its last sampled token, and take the KL to the reference off every token.

    Args:
      batch: where the tokens stand.
      scores: log-probs of policy and reference.
      turn_rewards: penalties taken off.
      reward_kl_coef: weight of the KL (k1).

    Returns:
      The rewards, and the slots of the tokens (`make_line`).
    """
    shape = (turn_rewards.shape[0], turn_rewards.shape[1])
    slots = turn_slots(batch.loss_mask, batch.trajectory_ids, batch.turn_ids, shape)
    rewards = place_turn_values(turn_rewards, slots)
    if reward_kl_coef:
        rewards = rewards - reward_kl_coef * (scores.old_logprobs - scores.ref_logprobs)
    return rewards, slots


def _reference(reward_kl_coef: NonNegative) -> tuple[str, ...]:
    return ("ref_logprobs",) if reward_kl_coef else ()


def reinforce_pp(
    *,
    gamma: Share = default_of(returns.reinforce_pp, "gamma"),
    reward_kl_coef: NonNegative = 0.0,
    group_baseline: bool = False,
) -> Part:
    """Bind REINFORCE++: whitened reward-to-go of tokens (https://arxiv.org/abs/2501.03262).

    Args:
      gamma: Discount per sampled token (REINFORCE++, PPO).
      reward_kl_coef: Weight of a KL penalty (k1) inside the reward, in place of kl_coef.
      group_baseline: Reward an episode at its end alone, with its return less that of the task's attempts.
    """
    options: dict[str, Any] = dict(locals())

    def estimate(batch: Batch, scores: Scores, worth: Worth) -> TokenCredit:
        table = worth.turn_rewards - worth.turn_penalties
        if group_baseline:  # the whole return counts at the end: a baseline of it fits no single turn
            centered, _, _ = center_by_group(worth.returns, batch.group_ids, worth.returns.shape[0])
            table = jnp.where(last_turns(worth.mask), centered[:, None], 0)
        rewards, slots = token_rewards(batch, scores, table, reward_kl_coef)
        return TokenCredit(whiten(token_reward_to_go(rewards, slots, worth.mask.shape[1], gamma), slots >= 0))

    return Part("reinforce_pp", options, estimate, needs=_reference(reward_kl_coef))


def values_of_cut(
    batch: Batch, values: Float[Array, "B T"], slots: Int[Array, "B T"], worth: Worth
) -> Float[Array, "B T"]:
    """Find the value of the state that a limit cut each episode in, on its last token; 0 elsewhere.

    No score exists for the state after the last response; the last token's value is the nearest. An episode
    that broke a limit does not go on.

    Args:
      batch: which episodes a limit ended.
      values: the critic's, before the update.
      slots: as in `make_line`.
      worth: which turns exist.
    """
    goes_on = (batch.truncated & ~batch.scored_zero)[:, None] & last_turns(worth.mask)
    is_last = place_turn_values(goes_on.astype(jnp.float32), slots) > 0
    return jnp.where(is_last, values, 0)


def ppo(
    *,
    gamma: Share = default_of(returns.gae, "gamma"),
    lam: Share = default_of(returns.gae, "lam"),
    reward_kl_coef: NonNegative = 0.0,
    bootstrap: bool = False,
) -> Part:
    """Bind `gae` along every trajectory, whitened over the batch (https://arxiv.org/abs/1707.06347).

    Args:
      gamma: Discount per sampled token (REINFORCE++, PPO).
      lam: λ of generalized advantage estimation.
      reward_kl_coef: Weight of a KL penalty (k1) inside the reward, in place of kl_coef.
      bootstrap: Continue an episode that a turn or time limit ended with the critic's last value, not with 0.
    """
    options: dict[str, Any] = dict(locals())

    def estimate(batch: Batch, scores: Scores, worth: Worth) -> TokenCredit:
        if scores.values is None:
            raise ValueError(
                "this algorithm has a critic: scores.values must hold its values before the update"
            )
        table = worth.turn_rewards - worth.turn_penalties
        rewards, slots = token_rewards(batch, scores, table, reward_kl_coef)
        if bootstrap:
            rewards = rewards + gamma * values_of_cut(batch, scores.values, slots, worth)
        line = make_line(slots, worth.mask.shape[1])
        streams = (line.gather(rewards), line.gather(scores.values), line.mask)
        found = returns.gae(*streams, gamma=gamma, lam=lam, ends=line.ends)
        estimated, targets = (line.scatter(stream, slots) for stream in found)
        return TokenCredit(estimated, targets, is_whitened=True)

    return Part("ppo", options, estimate, needs=("values", *_reference(reward_kl_coef)))
