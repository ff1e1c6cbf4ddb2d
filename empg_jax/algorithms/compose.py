"""An algorithm is a pair of pure functions, composed from small ones.

::

    credit(batch, scores)       estimator → modulation → tokens, with loss weights, on the whole global batch
    loss(logprobs, …)           objective + KL − entropy bonus, per token, on any rows of it

An *estimator* gives turns a base advantage, a *modulation* reweights turns by their entropy, an *objective* is a
per-token loss. `Recipe` holds the plain numbers; `build` makes the pair.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from empg_jax.algorithms.diagnostics import credit_metrics
from empg_jax.algorithms.losses import AGGREGATIONS, KL_KINDS, kl_penalty, log_ratio, loss_weights
from empg_jax.algorithms.masking import Scalar, check_choice, compute_turn_entropies, turns_to_tokens
from empg_jax.algorithms.modulation import aem, compute_factors, empg, scope_segments
from empg_jax.algorithms.objectives import OBJECTIVES
from empg_jax.types import Batch, Credit, Scores

LossResult = tuple[Float[Array, "B T"], dict[str, Float[Array, "B T"]]]
MODULATIONS = ("none", "empg", "aem")


class Algorithm(NamedTuple):
    """What the learner executes; it knows nothing else of an algorithm.

    Attributes:
      credit: ``(batch, scores) -> Credit``, on the whole global batch, before any split.
      loss: ``(logprobs, entropies, batch_rows, scores_rows, advantages) -> (loss, metrics)``: loss per token, KL and
        entropy bonus included, 0 off the loss mask; metrics per token, to be averaged over the loss mask. The
        training loss is ``sum(loss * loss_weights)``.
    """

    credit: Callable[[Batch, Scores], Credit]
    loss: Callable[..., LossResult]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmpgSettings:
    """Keywords of `empg`."""

    k: Scalar = 1.0
    k_future: Scalar = 1.0
    zeta: Scalar = 0.1
    scope: str = "batch"
    center: str = "turn"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AemSettings:
    """Keywords of `aem`."""

    lam: Scalar = 1.0
    scope: str = "group"
    min_range: Scalar = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that distinguishes one algorithm from another.

    Attributes:
      estimator: ``(batch, turn_mask, recipe) -> float[N, K]``, base advantages of the turns.
      scale_by_std: divide by the group's standard deviation, where the estimator knows it.
      singleton: what a group of one gives: ``zero`` or ``raw``.
      modulation: ``none``, ``empg`` or ``aem``.
      empg: keywords of EMPG.
      aem: keywords of AEM.
      loss: a name in `OBJECTIVES`.
      loss_aggregation: a mode of `loss_weights`.
      loss_scale: divisor of ``seq-mean-token-sum-norm``; None = the row length.
      clip_low: lower clip; None = the objective's own default.
      clip_high: upper clip; None = the objective's own default.
      dual_clip: bound for negative advantages; None = off.
      kl_coef: weight of the KL penalty in the loss.
      kl_kind: kind of `kl_penalty`.
      entropy_coef: weight of the entropy bonus.
    """

    estimator: Callable[[Batch, Bool[Array, "N K"], "Recipe"], Float[Array, "N K"]]
    scale_by_std: bool = True
    singleton: str = "zero"
    modulation: str = "none"
    empg: EmpgSettings = EmpgSettings()
    aem: AemSettings = AemSettings()
    loss: str = "ppo_clip"
    loss_aggregation: str = "token-mean"
    loss_scale: Scalar | None = None
    clip_low: Scalar | None = None
    clip_high: Scalar | None = None
    dual_clip: Scalar | None = 3.0
    kl_coef: Scalar = 0.0
    kl_kind: str = "k3"
    entropy_coef: Scalar = 0.0

    def __post_init__(self) -> None:
        check_choice("modulation", self.modulation, MODULATIONS)
        check_choice("loss", self.loss, tuple(OBJECTIVES))
        check_choice("loss_aggregation", self.loss_aggregation, AGGREGATIONS)
        check_choice("kl_kind", self.kl_kind, KL_KINDS)


def modulate(
    base: Float[Array, "N K"],
    turn_entropies: Float[Array, "N K"],
    turn_mask: Bool[Array, "N K"],
    group_ids: Int[Array, " N"],
    recipe: Recipe,
) -> tuple[Float[Array, "N K"], Float[Array, "N K"]]:
    """Applies the recipe's modulation; returns the advantages and the factors that multiplied them."""
    if recipe.modulation == "none":
        return base, turn_mask.astype(base.dtype)
    if recipe.modulation == "empg":
        settings = recipe.empg
        advantages = empg(
            base, turn_entropies, turn_mask, group_ids=group_ids, **dataclasses.asdict(settings)
        )
        decay, eps, min_range = settings.k, 1e-8, 0.0
    else:
        settings = recipe.aem
        advantages = aem(base, turn_entropies, turn_mask, group_ids=group_ids, **dataclasses.asdict(settings))
        decay, eps, min_range = settings.lam, 0.0, settings.min_range
    segments = scope_segments(settings.scope, group_ids)
    factors, _ = compute_factors(
        turn_entropies, turn_mask, segments, decay=decay, eps=eps, min_range=min_range
    )
    return advantages, factors


def minibatch_weights(
    batch: Batch, num_minibatches: int, *, mode: str, scale: Scalar | None = None
) -> Float[Array, "B T"]:
    """Loss weights of each mini-batch over itself alone; 0 on rows that are in none.

    Args:
      batch: ``minibatch_ids`` says which rows make a mini-batch.
      num_minibatches: static bound of the ids.
      mode: see `loss_weights`.
      scale: see `loss_weights`.
    """
    total = jnp.zeros(batch.loss_mask.shape, jnp.float32)
    for number in range(num_minibatches):
        rows = (batch.minibatch_ids == number)[:, None]
        weights = loss_weights(
            batch.loss_mask & rows, mode=mode, sequence_ids=batch.sequence_ids, scale=scale
        )
        total = total + weights.astype(jnp.float32)
    return total


def make_credit(recipe: Recipe, *, num_minibatches: int = 1) -> Callable[[Batch, Scores], Credit]:
    """Builds credit assignment: estimator, modulation, tokens, weights, and what a person wants to see of them.

    Args:
      recipe: the algorithm.
      num_minibatches: optimizer steps that the batch is split into.
    """

    def credit(batch: Batch, scores: Scores) -> Credit:
        present = batch.loss_mask & (batch.minibatch_ids >= 0)[:, None]
        place = (batch.trajectory_ids, batch.turn_ids)
        num_trajectories, num_turns = batch.turn_returns.shape
        turn_entropies, turn_mask = compute_turn_entropies(
            scores.entropies, present, *place, num_trajectories=num_trajectories, num_turns=num_turns
        )
        group_ids = jnp.where(batch.trajectory_mask, batch.group_ids, -1)
        turn_mask = turn_mask & (group_ids >= 0)[:, None]
        batch = batch.replace(group_ids=group_ids)
        base = jnp.where(turn_mask, recipe.estimator(batch, turn_mask, recipe), 0)
        advantages, factors = modulate(base, turn_entropies, turn_mask, group_ids, recipe)
        weights = minibatch_weights(
            batch, num_minibatches, mode=recipe.loss_aggregation, scale=recipe.loss_scale
        )
        metrics = credit_metrics(
            base, advantages, factors, turn_entropies, turn_mask, batch.returns, group_ids
        )
        tokens = turns_to_tokens(advantages, present, *place).astype(jnp.float32)
        return jax.lax.stop_gradient(Credit(advantages=tokens, loss_weights=weights, metrics=metrics))

    return credit


def make_loss(recipe: Recipe) -> Callable[..., LossResult]:
    """Builds the per-token training loss: objective + kl_coef · KL − entropy_coef · entropy.

    Args:
      recipe: the algorithm.
    """
    objective = OBJECTIVES[recipe.loss](recipe)

    def loss(
        logprobs: Float[Array, "B T"],
        entropies: Float[Array, "B T"],
        batch_rows: Batch,
        scores_rows: Scores,
        advantages: Float[Array, "B T"],
    ) -> LossResult:
        mask = batch_rows.loss_mask
        # Overwritten before any arithmetic: neither value nor gradient can leak from an untrained token.
        logprobs, entropies, advantages = (jnp.where(mask, x, 0) for x in (logprobs, entropies, advantages))
        scores_rows = jax.tree.map(lambda x: jnp.where(mask, x, 0), scores_rows)
        values, metrics = objective(logprobs, batch_rows, scores_rows, advantages)
        change = log_ratio(logprobs, scores_rows.old_logprobs)
        metrics |= {"ratio": jnp.exp(change), "approx_kl": jnp.expm1(change) - change}
        if recipe.kl_coef:
            divergence = kl_penalty(logprobs, scores_rows.ref_logprobs, kind=recipe.kl_kind)
            values = values + recipe.kl_coef * divergence
            metrics["ref_kl"] = divergence
        if recipe.entropy_coef:
            values = values - recipe.entropy_coef * entropies
        return jnp.where(mask, values, 0), jax.lax.stop_gradient(metrics)

    return loss


def build(recipe: Recipe, *, num_minibatches: int = 1) -> Algorithm:
    """The pair of pure functions of a recipe.

    Args:
      recipe: the algorithm.
      num_minibatches: optimizer steps that each batch is split into, at least 1.
    """
    if num_minibatches < 1:
        raise ValueError(f"num_minibatches={num_minibatches} must be at least 1")
    return Algorithm(credit=make_credit(recipe, num_minibatches=num_minibatches), loss=make_loss(recipe))
