"""Estimators that give every turn a credit of its own, from what the attempts at a task have in common."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from empg_jax.algorithms import advantages, gains, graph_credit, histories, milestones, turn_values
from empg_jax.algorithms.contract import TokenCredit, Worth
from empg_jax.algorithms.masking import (
    Count,
    Length,
    NonNegative,
    Portion,
    Positive,
    Share,
    check_choice,
)
from empg_jax.algorithms.part import Part, default_of
from empg_jax.algorithms.parts.estimate import discounted_turns, values_of_cut
from empg_jax.algorithms.segments import turn_slots, turns_to_tokens
from empg_jax.types import Batch, Scores


def _pure(options: dict[str, Any], *others: str) -> dict[str, Any]:
    """Keep the options that the pure function has."""
    return {key: value for key, value in options.items() if key not in ("anchor_similarity", *others)}


def hgpo(
    *,
    history: Count = default_of(histories.hgpo, "history"),
    alpha: NonNegative = default_of(histories.hgpo, "alpha"),
    level_offset: Positive = default_of(histories.hgpo, "level_offset"),
    drop_zeros: bool = default_of(histories.hgpo, "drop_zeros"),
    base_group: bool = False,
    turn_gamma: Share = 0.95,
    scale_by_std: bool = default_of(histories.hgpo, "scale_by_std"),
    eps: Positive = default_of(histories.hgpo, "eps"),
    anchor_similarity: Portion = 1.0,
) -> Part:
    """Bind `hgpo` on discounted returns of turns (https://arxiv.org/abs/2602.22817).

    Args:
      history: Longest common history that HGPO compares turns by.
      alpha: Exponent of the weights of longer histories; 0 weighs all alike.
      level_offset: Added to a history's length in its weight; 2 is the released code, 1 the paper.
      drop_zeros: Skip levels where a turn's credit is exactly 0.
      base_group: Add the advantage of the episode (GRPO) as a level of weight 1.
      turn_gamma: Discount per turn of step returns, milestones and temporal differences of turns.
      scale_by_std: Divide group advantages by the group's standard deviation.
      eps: Added to a group's standard deviation, where scale_by_std is on.
      anchor_similarity: Observations at least this alike (difflib ratio) are one anchor; 1 is equal ones.
    """
    options: dict[str, Any] = dict(locals())
    kept = _pure(options, "turn_gamma", "base_group")

    def estimate(batch: Batch, scores: Scores, worth: Worth) -> Float[Array, "N K"]:
        base = None
        if base_group:
            base = advantages.grpo_turn_rows(
                worth.turn_scores, worth.mask, batch.group_ids, scale_by_std=scale_by_std, eps=eps
            )
        values = discounted_turns(worth, turn_gamma)
        return histories.hgpo(values, batch.anchor_ids, worth.mask, batch.group_ids, base=base, **kept)

    return Part("hgpo", options, estimate)


def crbc(
    *,
    beta: Share = default_of(graph_credit.crbc, "beta"),
    weight: NonNegative = default_of(graph_credit.crbc, "weight"),
    trajectory_weight: NonNegative = default_of(graph_credit.crbc, "trajectory_weight"),
    min_std: Positive = default_of(graph_credit.crbc, "min_std"),
    sweeps: Length = default_of(graph_credit.crbc, "sweeps"),
    scale_by_std: bool = default_of(graph_credit.crbc, "scale_by_std"),
    anchor_similarity: Portion = 1.0,
) -> Part:
    """Bind `crbc` (https://arxiv.org/abs/2609.35082).

    Args:
      beta: Discount per move on the state graph.
      weight: Weight of the step part on the state graph.
      trajectory_weight: Weight of the trajectory part (GRPO) beside it.
      min_std: Smallest spread of a state's moves that CRBC divides by.
      sweeps: Largest number of sweeps over the state graph.
      scale_by_std: Divide group advantages by the group's standard deviation.
      anchor_similarity: Observations at least this alike (difflib ratio) are one anchor; 1 is equal ones.
    """
    options: dict[str, Any] = dict(locals())
    kept = _pure(options)

    def estimate(batch: Batch, scores: Scores, worth: Worth) -> Float[Array, "N K"]:
        place = (batch.anchor_ids, batch.action_ids, worth.mask, batch.group_ids)
        return graph_credit.crbc(worth.returns, batch.success, *place, **kept)

    return Part("crbc", options, estimate, needs=("success", "actions"))


def graph_hca(
    *,
    gamma: Share = default_of(graph_credit.graph_hca, "gamma"),
    floor: Positive = default_of(graph_credit.graph_hca, "floor"),
    weight: NonNegative = default_of(graph_credit.graph_hca, "weight"),
    sweeps: Length = default_of(graph_credit.graph_hca, "sweeps"),
    anchor_similarity: Portion = 1.0,
) -> Part:
    """Bind `graph_hca` (https://arxiv.org/abs/2609.35084).

    Args:
      gamma: Discount per move on the state graph.
      floor: Smallest chance of the goal that GraphHCA tells from none.
      weight: Weight of the step part on the state graph.
      sweeps: Largest number of sweeps over the state graph.
      anchor_similarity: Observations at least this alike (difflib ratio) are one anchor; 1 is equal ones.
    """
    options: dict[str, Any] = dict(locals())
    kept = _pure(options)

    def estimate(batch: Batch, scores: Scores, worth: Worth) -> Float[Array, "N K"]:
        place = (batch.success, batch.anchor_ids, worth.mask, batch.group_ids)
        return graph_credit.graph_hca(worth.returns, *place, **kept)

    return Part("graph_hca", options, estimate, needs=("success",))


def graft(
    *,
    gamma: Share = default_of(graph_credit.graft, "gamma"),
    lam: Share = default_of(graph_credit.graft, "lam"),
    eps: Positive = default_of(graph_credit.graft, "eps"),
    sweeps: Length = default_of(graph_credit.graft, "sweeps"),
    anchor_similarity: Portion = 1.0,
) -> Part:
    """Bind `graft`: temporal differences on the state graph, without a trajectory part.

    Args:
      gamma: Discount per move on the state graph.
      lam: λ of GRAFT's sum over further moves; 0 leaves single differences.
      eps: Added to a group's standard deviation.
      sweeps: Largest number of sweeps over the state graph.
      anchor_similarity: Observations at least this alike (difflib ratio) are one anchor; 1 is equal ones.
    """
    options: dict[str, Any] = dict(locals())
    kept = _pure(options)

    def estimate(batch: Batch, scores: Scores, worth: Worth) -> Float[Array, "N K"]:
        place = (batch.anchor_ids, batch.action_ids, worth.mask, batch.group_ids)
        return graph_credit.graft(batch.success, *place, **kept)

    return Part("graft", options, estimate, needs=("success", "actions"))


def graph_gpo(
    *,
    decay: Portion = default_of(graph_credit.graph_gpo, "decay"),
    step_weight: NonNegative = default_of(graph_credit.graph_gpo, "step_weight"),
    episode_weight: NonNegative = default_of(graph_credit.graph_gpo, "episode_weight"),
    eps: Positive = default_of(graph_credit.graph_gpo, "eps"),
    sweeps: Length = default_of(graph_credit.graph_gpo, "sweeps"),
    fail_node: Literal["absorbing", "observation"] = default_of(graph_credit.graph_gpo, "fail_node"),
    anchor_similarity: Portion = 1.0,
) -> Part:
    """Bind `graph_gpo` (https://arxiv.org/abs/2605.26684).

    Args:
      decay: Worth of a state in GraphGPO for each further move to the goal.
      step_weight: Weight of the step part on the state graph.
      episode_weight: Weight of the trajectory part (GRPO) beside it.
      eps: Added to a group's standard deviation.
      sweeps: Largest number of sweeps over the state graph.
      fail_node: Where GraphGPO lets a failed episode end: in a node of its own, or in what it saw last.
      anchor_similarity: Observations at least this alike (difflib ratio) are one anchor; 1 is equal ones.
    """
    options: dict[str, Any] = dict(locals())
    kept = _pure(options)

    def estimate(batch: Batch, scores: Scores, worth: Worth) -> Float[Array, "N K"]:
        place = (batch.success, batch.anchor_ids, worth.mask, batch.group_ids)
        ends = batch.last_anchor_ids
        return graph_credit.graph_gpo(worth.returns, *place, last_anchor_ids=ends, **kept)

    return Part("graph_gpo", options, estimate, needs=("success",))


def gagpo(
    *,
    turn_gamma: Share = default_of(turn_values.gagpo, "gamma"),
    turn_lam: Share = default_of(turn_values.gagpo, "lam"),
    normalize: Literal["group", "none"] = default_of(turn_values.gagpo, "normalize"),
    eps: Positive = default_of(turn_values.gagpo, "eps"),
    anchor_similarity: Portion = 1.0,
) -> Part:
    """Bind `gagpo` on the turns' rewards, penalties taken off (https://arxiv.org/abs/2605.13217).

    Args:
      turn_gamma: Discount per turn of step returns, milestones and temporal differences of turns.
      turn_lam: λ of the temporal differences of turns (GAGPO, Turn-PPO).
      normalize: Turns that GAGPO normalizes advantages over.
      eps: Added to a group's standard deviation.
      anchor_similarity: Observations at least this alike (difflib ratio) are one anchor; 1 is equal ones.
    """
    options: dict[str, Any] = dict(locals())
    check_choice("gagpo_normalize", normalize, turn_values.NORMALIZE)

    def estimate(batch: Batch, scores: Scores, worth: Worth) -> Float[Array, "N K"]:
        rewards = worth.turn_rewards - worth.turn_penalties
        place = (batch.anchor_ids, worth.mask, batch.group_ids)
        return turn_values.gagpo(
            rewards, *place, gamma=turn_gamma, lam=turn_lam, normalize=normalize, eps=eps
        )

    return Part("gagpo", options, estimate)


def beacon(
    *,
    turn_gamma: Share = default_of(milestones.beacon, "gamma"),
    weight: NonNegative = default_of(milestones.beacon, "weight"),
    scale: Positive = default_of(milestones.beacon, "scale"),
    scale_by_std: bool = default_of(milestones.beacon, "scale_by_std"),
    eps: Positive = default_of(milestones.beacon, "eps"),
) -> Part:
    """Bind `beacon` on the milestones that the environment reports (https://arxiv.org/abs/2605.06078).

    Args:
      turn_gamma: Discount per turn of step returns, milestones and temporal differences of turns.
      weight: Weight of BEACON's milestones beside the return.
      scale: Worth of a milestone in BEACON; a success is worth the return.
      scale_by_std: Divide group advantages by the group's standard deviation.
      eps: Added to a group's standard deviation, where scale_by_std is on.
    """
    options: dict[str, Any] = dict(locals())
    kept = _pure(options, "turn_gamma")

    def estimate(batch: Batch, scores: Scores, worth: Worth) -> Float[Array, "N K"]:
        place = (batch.milestones, worth.mask, batch.group_ids)
        return milestones.beacon(worth.returns, *place, gamma=turn_gamma, **kept)

    return Part("beacon", options, estimate, needs=("milestones",))


def igpo(
    *,
    turn_gamma: Share = default_of(gains.igpo, "gamma"),
    normalize: Literal["joint", "separate"] = default_of(gains.igpo, "normalize"),
    kind: Literal["prob", "logprob"] = default_of(gains.igpo, "kind"),
) -> Part:
    """Bind `igpo` on the returns and the scored answers (https://arxiv.org/abs/2510.14967).

    Args:
      turn_gamma: Discount per turn of step returns, milestones and temporal differences of turns.
      normalize: Normalize gains and outcomes of a task together or apart (IGPO).
      kind: What a turn gains: probability of the known answer, or log-probability (IGPO, A2TGPO).
    """
    options: dict[str, Any] = dict(locals())

    def estimate(batch: Batch, scores: Scores, worth: Worth) -> Float[Array, "N K"]:
        streams = (_after_turns(batch), worth.returns, worth.mask, batch.group_ids)
        return gains.igpo(*streams, gamma=turn_gamma, normalize=normalize, kind=kind)

    return Part("igpo", options, estimate, needs=("answer_logprobs",))


def a2tgpo(
    *,
    turn_gamma: Share = default_of(gains.a2tgpo, "gamma"),
    alpha: NonNegative = default_of(gains.a2tgpo, "alpha"),
    clip_range: Share = default_of(gains.a2tgpo, "clip_range"),
    kind: Literal["prob", "logprob"] = default_of(gains.information_gains, "kind"),
) -> Part:
    """Bind `a2tgpo` on the returns and the scored answers (https://arxiv.org/abs/2605.06200).

    Args:
      turn_gamma: Discount per turn of step returns, milestones and temporal differences of turns.
      alpha: Weight of a turn's gains beside the outcome (A2TGPO).
      clip_range: Largest change of a turn's clip range by its gain (A2TGPO); 0 leaves all alike.
      kind: What a turn gains: probability of the known answer, or log-probability (IGPO, A2TGPO).
    """
    options: dict[str, Any] = dict(locals())

    def estimate(batch: Batch, scores: Scores, worth: Worth) -> TokenCredit:
        gained = gains.information_gains(_after_turns(batch), worth.mask, kind=kind)
        rest = {"alpha": alpha, "gamma": turn_gamma, "clip_range": clip_range}
        found = gains.a2tgpo(gained, worth.returns, worth.mask, batch.group_ids, **rest)
        place = (batch.loss_mask, batch.trajectory_ids, batch.turn_ids)
        estimated, scale = (turns_to_tokens(table, *place) for table in found)
        return TokenCredit(estimated, clip_scale=scale)

    return Part("a2tgpo", options, estimate, needs=("answer_logprobs",), scales_clip=True)


def _after_turns(batch: Batch) -> Float[Array, "N L"]:
    """Arrange scored answers as `information_gains` reads them: after turn t is before turn t + 1."""
    return jnp.pad(batch.answer_logprobs, ((0, 0), (0, 1)))  # what follows a last turn is not read


def _at_first_tokens(values: Float[Array, "B T"], slots: Int[Array, "B T"], size: int) -> Float[Array, " M"]:
    """Read a stream at the first sampled token of each turn; 0 where a turn has none."""
    places = jnp.arange(slots.size, dtype=jnp.int32)
    home = jnp.where(slots >= 0, slots, size).ravel()
    first = jax.ops.segment_min(places, home, num_segments=size + 1)[:size]
    found = jnp.where(slots >= 0, values, 0).ravel()[jnp.minimum(first, slots.size - 1)]
    return jnp.where(first < slots.size, found, 0)


def turn_ppo(
    *,
    turn_gamma: Share = default_of(turn_values.turn_gae, "gamma"),
    turn_lam: Share = default_of(turn_values.turn_gae, "lam"),
    bootstrap: bool = False,
) -> Part:
    """Bind `turn_gae`: the turn is the action (Turn-PPO, https://arxiv.org/abs/2512.17008).

    A turn's value is the critic's in the state before its first token; all its tokens learn that target.

    Args:
      turn_gamma: Discount per turn of step returns, milestones and temporal differences of turns.
      turn_lam: λ of the temporal differences of turns (GAGPO, Turn-PPO).
      bootstrap: Continue an episode that a turn or time limit ended with the critic's last value, not with 0.
    """
    options: dict[str, Any] = dict(locals())

    def estimate(batch: Batch, scores: Scores, worth: Worth) -> TokenCredit:
        if scores.values is None:
            raise ValueError(
                "this algorithm has a critic: scores.values must hold its values before the update"
            )
        place = (batch.loss_mask, batch.trajectory_ids, batch.turn_ids)
        slots = turn_slots(*place, (worth.mask.shape[0], worth.mask.shape[1]))
        values = _at_first_tokens(scores.values, slots, worth.mask.size).reshape(worth.mask.shape)
        rewards = worth.turn_rewards - worth.turn_penalties
        after = None
        if bootstrap:
            cut = values_of_cut(batch, scores.values, slots, worth)
            home = jnp.maximum(slots, 0) // worth.mask.shape[1]
            after = jax.ops.segment_sum(cut.ravel(), home.ravel(), num_segments=worth.mask.shape[0])
        found = turn_values.turn_gae(
            rewards, values, worth.mask, gamma=turn_gamma, lam=turn_lam, bootstrap=after
        )
        estimated, targets = (turns_to_tokens(table, *place) for table in found)
        return TokenCredit(estimated, targets, is_whitened=True)

    return Part("turn_ppo", options, estimate, needs=("values",))
