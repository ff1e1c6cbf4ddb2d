"""Objectives by name: each binds a per-token loss to the carriers that the learner hands over.

An entry of `OBJECTIVES` takes the recipe and returns an `Objective`:
``(logprobs, rows, scores, advantages) -> (loss, metrics)``.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from empg_jax.algorithms.clipped import (
    check_dual_clip,
    decoupled_ppo,
    gspo,
    log_ratio,
    ppo_clip,
    segment_log_ratio,
    turn_ratio_clip,
)
from empg_jax.algorithms.losses import cispo, reinforce_loss, sapo
from empg_jax.types import Batch, Scores

LossResult = tuple[Float[Array, "B T"], dict[str, Float[Array, "B T"]]]
Objective = Callable[[Float[Array, "B T"], Batch, Scores, Float[Array, "B T"]], LossResult]


def clip_range(recipe: Any, low: float, high: float) -> dict[str, Any]:
    """The recipe's clip range, with the objective's own defaults where it has none."""
    return {
        "clip_low": low if recipe.clip_low is None else recipe.clip_low,
        "clip_high": high if recipe.clip_high is None else recipe.clip_high,
    }


def clipped_share(
    log_ratios: Float[Array, "B T"], advantages: Float[Array, "B T"], bounds: dict[str, Any]
) -> dict[str, Float[Array, "B T"]]:
    """1 where the ratio is beyond the range on the side that the advantage pushes to."""
    ratios = jnp.exp(log_ratios)
    above = (ratios > 1 + bounds["clip_high"]) & (advantages > 0)
    below = (ratios < 1 - bounds["clip_low"]) & (advantages < 0)
    return {"clip_fraction": (above | below).astype(ratios.dtype)}


def make_ppo_clip(recipe: Any) -> Objective:
    """`ppo_clip` with the recipe's range and dual clip."""
    check_dual_clip(recipe.dual_clip)
    bounds = clip_range(recipe, 0.2, 0.2)

    def objective(
        logprobs: Float[Array, "B T"], rows: Batch, scores: Scores, advantages: Float[Array, "B T"]
    ) -> LossResult:
        loss = ppo_clip(logprobs, scores.old_logprobs, advantages, dual_clip=recipe.dual_clip, **bounds)
        change = log_ratio(logprobs, scores.old_logprobs)
        metrics = clipped_share(change, advantages, bounds)
        if recipe.dual_clip is not None:
            bound = (advantages < 0) & (jnp.exp(change) > recipe.dual_clip)
            metrics["dual_clip_fraction"] = bound.astype(loss.dtype)
        return loss, metrics

    return objective


def sequence_tokens(rows: Batch) -> Int[Array, "B T"]:
    """Sequence id of each trained token, -1 elsewhere."""
    return jnp.where(rows.loss_mask, rows.sequence_ids, -1)


def turn_tokens(rows: Batch) -> Int[Array, "B T"]:
    """An id of each trained token's turn, -1 elsewhere."""
    turns = rows.trajectory_ids * rows.turn_returns.shape[1] + rows.turn_ids
    return jnp.where(rows.loss_mask, turns, -1)


def _make_segment_objective(
    loss_of: Callable[..., Float[Array, "B T"]],
    ids_of: Callable[[Batch], Int[Array, "B T"]],
    bounds: dict[str, Any],
) -> Objective:
    def objective(
        logprobs: Float[Array, "B T"], rows: Batch, scores: Scores, advantages: Float[Array, "B T"]
    ) -> LossResult:
        ids = ids_of(rows)
        loss = loss_of(logprobs, scores.old_logprobs, advantages, ids, **bounds)
        change = segment_log_ratio(logprobs, scores.old_logprobs, ids)
        return loss, clipped_share(jnp.minimum(change, 10), advantages, bounds)

    return objective


def make_gspo(recipe: Any) -> Objective:
    """`gspo` over packed sequences (in transcript context, trajectories)."""
    return _make_segment_objective(gspo, sequence_tokens, clip_range(recipe, 3e-4, 4e-4))


def make_turn_ratio_clip(recipe: Any) -> Objective:
    """`turn_ratio_clip` over turns."""
    return _make_segment_objective(turn_ratio_clip, turn_tokens, clip_range(recipe, 0.2, 0.2))


def make_cispo(recipe: Any) -> Objective:
    """`cispo` with the recipe's range."""
    bounds = clip_range(recipe, 1.0, 0.28)

    def objective(
        logprobs: Float[Array, "B T"], rows: Batch, scores: Scores, advantages: Float[Array, "B T"]
    ) -> LossResult:
        change = log_ratio(logprobs, scores.old_logprobs)
        loss = cispo(logprobs, scores.old_logprobs, advantages, **bounds)
        return loss, clipped_share(change, advantages, bounds)

    return objective


def make_sapo(recipe: Any) -> Objective:
    """`sapo` with its published temperatures."""

    def objective(
        logprobs: Float[Array, "B T"], rows: Batch, scores: Scores, advantages: Float[Array, "B T"]
    ) -> LossResult:
        return sapo(logprobs, scores.old_logprobs, advantages), {}

    return objective


def make_reinforce(recipe: Any) -> Objective:
    """`reinforce_loss`."""

    def objective(
        logprobs: Float[Array, "B T"], rows: Batch, scores: Scores, advantages: Float[Array, "B T"]
    ) -> LossResult:
        return reinforce_loss(logprobs, advantages), {}

    return objective


def make_decoupled_ppo(recipe: Any) -> Objective:
    """`decoupled_ppo`: clip against the learner before the update, weigh by its distance from the sampler."""
    bounds = clip_range(recipe, 0.2, 0.2)
    cap, mode = recipe.correction.stale_cap, recipe.correction.stale_mode

    def objective(
        logprobs: Float[Array, "B T"], rows: Batch, scores: Scores, advantages: Float[Array, "B T"]
    ) -> LossResult:
        behavior = jnp.where(rows.loss_mask, rows.behavior_logprobs, 0)
        loss = decoupled_ppo(
            logprobs, scores.old_logprobs, behavior, advantages, cap=cap, mode=mode, **bounds
        )
        stale = jnp.exp(log_ratio(scores.old_logprobs, behavior)) > cap
        metrics = clipped_share(log_ratio(logprobs, scores.old_logprobs), advantages, bounds)
        return loss, metrics | {"stale_fraction": stale.astype(loss.dtype)}

    return objective


OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    "ppo_clip": make_ppo_clip,
    "gspo": make_gspo,
    "turn_ratio_clip": make_turn_ratio_clip,
    "cispo": make_cispo,
    "sapo": make_sapo,
    "reinforce": make_reinforce,
    "decoupled_ppo": make_decoupled_ppo,
}
