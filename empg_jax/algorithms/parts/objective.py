"""Objectives: each binds a per-token loss to the data types that the learner passes."""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from empg_jax.algorithms import losses, surrogates
from empg_jax.algorithms.contract import LossResult
from empg_jax.algorithms.masking import AboveOne, Positive, check_choice
from empg_jax.algorithms.part import Part, default_of
from empg_jax.algorithms.parts.aggregate import unit_ids
from empg_jax.algorithms.surrogates import log_ratio, segment_log_ratio
from empg_jax.types import Batch, Scores

# A trajectory has none: it may lie in several rows, and a micro-batch holds any rows.
RATIO_UNITS = ("segment", "turn")


def _ranges(bounds: dict[str, Any], scores: Scores) -> dict[str, Any]:
    """Multiply the bounds of the ratio by what the credit gives each token, where it gives that."""
    if scores.clip_scale is None:
        return bounds
    return {name: bound * scores.clip_scale for name, bound in bounds.items()}


def clipped_share(
    log_ratios: Float[Array, "B T"], advantages: Float[Array, "B T"], bounds: dict[str, Any]
) -> dict[str, Float[Array, "B T"]]:
    """Mark with 1 where the ratio is beyond the range on the side that the advantage pushes to."""
    ratios = jnp.exp(log_ratios)
    above = (ratios > 1 + bounds["clip_high"]) & (advantages > 0)
    below = (ratios < 1 - bounds["clip_low"]) & (advantages < 0)
    return {"clip_fraction": (above | below).astype(ratios.dtype)}


def ppo_clip(
    *,
    clip_low: Positive = default_of(surrogates.ppo_clip, "clip_low"),
    clip_high: Positive = default_of(surrogates.ppo_clip, "clip_high"),
    dual_clip: AboveOne | None = default_of(surrogates.ppo_clip, "dual_clip"),
) -> Part:
    """Bind the clipped surrogate of PPO.

    Args:
      clip_low: Ratios are clipped at 1 - clip_low.
      clip_high: Ratios are clipped at 1 + clip_high.
      dual_clip: Bound of ppo_clip at negative advantages, above 1; null is off.
    """
    surrogates.check_dual_clip(dual_clip)
    bounds = {"clip_low": clip_low, "clip_high": clip_high}

    def objective(
        logprobs: Float[Array, "B T"], rows: Batch, scores: Scores, advantages: Float[Array, "B T"]
    ) -> LossResult:
        ranges = _ranges(bounds, scores)
        loss = surrogates.ppo_clip(logprobs, scores.old_logprobs, advantages, dual_clip=dual_clip, **ranges)
        change = log_ratio(logprobs, scores.old_logprobs)
        metrics = clipped_share(change, advantages, ranges)
        if dual_clip is not None:
            bound = (advantages < 0) & (jnp.exp(change) > dual_clip)
            metrics["dual_clip_fraction"] = bound.astype(loss.dtype)
        return loss, metrics

    return Part("ppo_clip", {**bounds, "dual_clip": dual_clip}, objective)


def _unit_objective(
    loss_of: Callable[..., Float[Array, "B T"]], unit: str, bounds: dict[str, Any], **ratio: str
) -> Callable[..., LossResult]:
    def objective(
        logprobs: Float[Array, "B T"], rows: Batch, scores: Scores, advantages: Float[Array, "B T"]
    ) -> LossResult:
        ids, ranges = unit_ids(rows, unit), _ranges(bounds, scores)
        loss = loss_of(logprobs, scores.old_logprobs, advantages, ids, **ranges, **ratio)
        change = segment_log_ratio(logprobs, scores.old_logprobs, ids, **ratio)
        return loss, clipped_share(jnp.minimum(change, 10), advantages, ranges)

    return objective


def gspo(
    *,
    clip_low: Positive = default_of(surrogates.gspo, "clip_low"),
    clip_high: Positive = default_of(surrogates.gspo, "clip_high"),
    unit: Literal["segment", "turn"] = "segment",
) -> Part:
    """Bind `gspo`: one ratio for a packed segment or a turn, each of which one row holds whole.

    Args:
      clip_low: Ratios are clipped at 1 - clip_low.
      clip_high: Ratios are clipped at 1 + clip_high.
      unit: Unit that has one ratio in gspo.
    """
    check_choice("ratio_unit", unit, RATIO_UNITS)
    bounds = {"clip_low": clip_low, "clip_high": clip_high}
    return Part("gspo", {**bounds, "unit": unit}, _unit_objective(surrogates.gspo, unit, bounds))


def turn_ratio_clip(
    *,
    clip_low: Positive = default_of(surrogates.turn_ratio_clip, "clip_low"),
    clip_high: Positive = default_of(surrogates.turn_ratio_clip, "clip_high"),
    ratio: Literal["mean", "product"] = default_of(surrogates.turn_ratio_clip, "ratio"),
) -> Part:
    """Bind `turn_ratio_clip`: one ratio for a turn.

    Args:
      clip_low: Ratios are clipped at 1 - clip_low.
      clip_high: Ratios are clipped at 1 + clip_high.
      ratio: Ratio of a turn in turn_ratio_clip, from those of its tokens; mean is the geometric one.
    """
    check_choice("turn_ratio", ratio, surrogates.TURN_RATIOS)
    bounds = {"clip_low": clip_low, "clip_high": clip_high}
    objective = _unit_objective(surrogates.turn_ratio_clip, "turn", bounds, ratio=ratio)
    return Part("turn_ratio_clip", {**bounds, "ratio": ratio}, objective)


def cispo(
    *,
    clip_low: Positive = default_of(losses.cispo, "clip_low"),
    clip_high: Positive = default_of(losses.cispo, "clip_high"),
) -> Part:
    """Bind `cispo`.

    Args:
      clip_low: Ratios are clipped at 1 - clip_low.
      clip_high: Ratios are clipped at 1 + clip_high.
    """
    bounds = {"clip_low": clip_low, "clip_high": clip_high}

    def objective(
        logprobs: Float[Array, "B T"], rows: Batch, scores: Scores, advantages: Float[Array, "B T"]
    ) -> LossResult:
        ratios, ranges = jnp.exp(log_ratio(logprobs, scores.old_logprobs)), _ranges(bounds, scores)
        loss = losses.cispo(logprobs, scores.old_logprobs, advantages, **ranges)
        # The weight is clipped on both sides, whatever the sign of the advantage.
        clipped = (ratios > 1 + ranges["clip_high"]) | (ratios < 1 - ranges["clip_low"])
        return loss, {"clip_fraction": clipped.astype(ratios.dtype)}

    return Part("cispo", bounds, objective)


def sapo(
    *,
    tau_pos: Positive = default_of(losses.sapo, "tau_pos"),
    tau_neg: Positive = default_of(losses.sapo, "tau_neg"),
) -> Part:
    """Bind `sapo`.

    Args:
      tau_pos: Steepness of sapo's gate at positive advantages.
      tau_neg: Steepness of sapo's gate at the others.
    """
    options = {"tau_pos": tau_pos, "tau_neg": tau_neg}

    def objective(
        logprobs: Float[Array, "B T"], rows: Batch, scores: Scores, advantages: Float[Array, "B T"]
    ) -> LossResult:
        return losses.sapo(logprobs, scores.old_logprobs, advantages, **options), {}

    return Part("sapo", options, objective)


def reinforce_loss() -> Part:
    """Bind `reinforce_loss`."""

    def objective(
        logprobs: Float[Array, "B T"], rows: Batch, scores: Scores, advantages: Float[Array, "B T"]
    ) -> LossResult:
        return losses.reinforce_loss(logprobs, advantages), {}

    return Part("reinforce_loss", {}, objective)


def decoupled_ppo(
    *,
    clip_low: Positive = default_of(surrogates.decoupled_ppo, "clip_low"),
    clip_high: Positive = default_of(surrogates.decoupled_ppo, "clip_high"),
    cap: Positive = default_of(surrogates.decoupled_ppo, "cap"),
    mode: Literal["mask", "clamp"] = default_of(surrogates.decoupled_ppo, "mode"),
) -> Part:
    """Bind `decoupled_ppo`: clip against the learner before the update, weigh by its distance from the
    sampler.

    Args:
      clip_low: Ratios are clipped at 1 - clip_low.
      clip_high: Ratios are clipped at 1 + clip_high.
      cap: Largest weight of a token in decoupled_ppo.
      mode: Treatment of tokens beyond that weight in decoupled_ppo.
    """
    check_choice("correction.stale_mode", mode, surrogates.STALE_MODES)
    bounds = {"clip_low": clip_low, "clip_high": clip_high}

    def objective(
        logprobs: Float[Array, "B T"], rows: Batch, scores: Scores, advantages: Float[Array, "B T"]
    ) -> LossResult:
        behavior, ranges = jnp.where(rows.loss_mask, rows.behavior_logprobs, 0), _ranges(bounds, scores)
        loss = surrogates.decoupled_ppo(
            logprobs, scores.old_logprobs, behavior, advantages, cap=cap, mode=mode, **ranges
        )
        stale = jnp.exp(log_ratio(scores.old_logprobs, behavior)) > cap
        metrics = clipped_share(log_ratio(logprobs, scores.old_logprobs), advantages, ranges)
        return loss, metrics | {"stale_fraction": stale.astype(loss.dtype)}

    return Part("decoupled_ppo", {**bounds, "cap": cap, "mode": mode}, objective)
