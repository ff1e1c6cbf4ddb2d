"""An algorithm is a pair of pure functions (three with a critic), composed from small ones.

::

    credit(batch, scores)       estimator → modulation → tokens, with loss weights, on the whole global batch
    loss(logprobs, …)           objective + KL − entropy bonus, per token, on any rows of it
    value_loss(values, …)       the critic's loss per token, likewise; None without a critic

An *estimator* gives turns a base advantage, a *modulation* reweights turns by their entropy, an *objective*
is a per-token loss. A `Recipe` holds the plain numbers; `build` makes the pair.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from empg_jax.algorithms.advantages import has_spread, overlong_penalty
from empg_jax.algorithms.aggregation import minibatch_weights
from empg_jax.algorithms.clipped import log_ratio
from empg_jax.algorithms.corrections import (
    effective_sample_size,
    mis_mask,
    offpolicy_sequence_mask,
    tis_weights,
)
from empg_jax.algorithms.diagnostics import (
    credit_metrics,
    explained_variance,
    mixed_group_share,
    predicted_entropy_drift,
)
from empg_jax.algorithms.estimators import gigpo_turns, grpo_row_turns
from empg_jax.algorithms.losses import kl_penalty, value_loss
from empg_jax.algorithms.masking import masked_mean
from empg_jax.algorithms.modulation import aem, empg
from empg_jax.algorithms.objectives import OBJECTIVES, LossResult
from empg_jax.algorithms.recipe import Recipe
from empg_jax.algorithms.segments import compute_turn_entropies, count_turn_tokens, turns_to_tokens
from empg_jax.types import Batch, Credit, Scores, TurnCredit

# Estimators that take the penalty of an invalid action off the turn itself, not off the episode.
TURN_PENALTIES = (grpo_row_turns, gigpo_turns)


class Algorithm(NamedTuple):
    """What the learner executes; it knows nothing else of an algorithm.

    Attributes:
      credit: ``(batch, scores) -> Credit``, on the whole global batch, before any split.
      loss: ``(logprobs, entropies, batch_rows, scores_rows, advantages) -> (loss, metrics)``: loss per
        token, KL and entropy bonus included, 0 off the loss mask; metrics per token, to be averaged over the
        loss mask. The training loss is ``sum(loss * loss_weights)``.
      value_loss: ``(values, batch_rows, scores_rows, value_targets) -> (loss, metrics)``, added to ``loss``,
        its coefficient included. With it, ``scores.values`` must be there. None without a critic.
    """

    credit: Callable[[Batch, Scores], Credit]
    loss: Callable[..., LossResult]
    value_loss: Callable[..., LossResult] | None = None


class Turns(NamedTuple):
    """The batch seen as a table of turns."""

    entropies: Float[Array, "N K"]
    mask: Bool[Array, "N K"]
    token_counts: Float[Array, "N K"]


def replace_fields(batch: Batch, **fields: Array) -> Batch:
    """A copy with some fields exchanged."""
    return Batch(**{f.name: fields.get(f.name, getattr(batch, f.name)) for f in dataclasses.fields(Batch)})


def drop_absent(batch: Batch) -> Batch:
    """Marks absent trajectories by group id -1, and masks their tokens and those of rows in no mini-batch."""
    group_ids = jnp.where(batch.trajectory_mask, batch.group_ids, -1)
    owner = group_ids[jnp.clip(batch.trajectory_ids, 0, group_ids.shape[0] - 1)]
    present = batch.loss_mask & (batch.minibatch_ids >= 0)[:, None] & (owner >= 0)
    return replace_fields(batch, loss_mask=present, group_ids=group_ids)


def make_turns(batch: Batch, scores: Scores) -> Turns:
    """Gathers the table of turns; rows of absent trajectories have no turn.

    Args:
      batch: with ``group_ids`` -1 where a trajectory is absent.
      scores: the entropies.
    """
    place = (batch.loss_mask, batch.trajectory_ids, batch.turn_ids)
    num_trajectories, num_turns = batch.turn_returns.shape
    size: dict[str, Any] = {"num_trajectories": num_trajectories, "num_turns": num_turns}
    entropies, mask = compute_turn_entropies(scores.entropies, *place, **size)
    counts = count_turn_tokens(*place, **size).astype(jnp.float32)
    return Turns(entropies, mask & (batch.group_ids >= 0)[:, None], counts)


def shape_returns(batch: Batch, turns: Turns, recipe: Recipe) -> Float[Array, " N"]:
    """Episode returns with the penalties that act before the base estimator.

    Args:
      batch: raw returns and which actions were valid.
      turns: which turns exist and how long they are.
      recipe: the penalties.
    """
    returns = batch.returns
    if recipe.invalid_penalty and recipe.estimator not in TURN_PENALTIES:
        invalid = jnp.sum(turns.mask & ~batch.turn_valid, axis=1, dtype=returns.dtype)
        returns = returns - recipe.invalid_penalty * invalid
    if recipe.overlong_length is not None and recipe.overlong_cache is not None:
        lengths = jnp.sum(turns.token_counts, axis=1)
        returns = returns + overlong_penalty(
            lengths, max_length=recipe.overlong_length, cache_length=recipe.overlong_cache
        )
    return returns


def modulate(
    base: Float[Array, "N K"], turns: Turns, batch: Batch, active: Bool[Array, " N"], recipe: Recipe
) -> tuple[Float[Array, "N K"], Float[Array, "N K"]]:
    """Applies the recipe's modulation; returns the advantages and the factors that multiplied them.

    Args:
      base: advantages of the estimator.
      turns: the table of turns.
      batch: group ids, and tokens to fold into the key of the shuffled control.
      active: trajectories of groups with different returns.
      recipe: which modulation, and its settings.
    """
    shared: dict[str, Any] = {"group_ids": batch.group_ids, "token_counts": turns.token_counts}
    ones = jnp.ones_like(base)
    if recipe.modulation == "empg":
        settings = dataclasses.asdict(recipe.empg)
        shared["active_mask"] = active if settings.pop("mixed_groups_only") else jnp.ones_like(active)
        advantages = empg(base, turns.entropies, turns.mask, **settings, **shared)
        plain = settings | {"zeta": 0.0, "center": "none", "whiten": False}
        return advantages, empg(ones, turns.entropies, turns.mask, **plain, **shared)
    if recipe.modulation == "aem":
        settings = dataclasses.asdict(recipe.aem)
        seed = settings.pop("shuffle_seed")
        if seed is not None:
            shared["shuffle_key"] = jax.random.fold_in(jax.random.key(seed), jnp.sum(batch.tokens))
        advantages = aem(base, turns.entropies, turns.mask, **settings, **shared)
        plain = settings | {"center": "none"}
        return advantages, aem(ones, turns.entropies, turns.mask, **plain, **shared)
    return base, jnp.where(turns.mask, ones, 0)


def turn_bonuses(
    turns: Turns, batch: Batch, active: Bool[Array, " N"], recipe: Recipe
) -> Float[Array, "N K"]:
    """What the modulation adds to each turn before centring."""
    zeros = jnp.zeros_like(turns.entropies)
    if recipe.modulation != "empg":
        return zeros
    settings = dataclasses.asdict(recipe.empg) | {"center": "none", "whiten": False}
    members = active if settings.pop("mixed_groups_only") else jnp.ones_like(active)
    return empg(
        zeros,
        turns.entropies,
        turns.mask,
        **settings,
        active_mask=members,
        group_ids=batch.group_ids,
        token_counts=turns.token_counts,
    )


def assign(
    batch: Batch, scores: Scores, turns: Turns, active: Bool[Array, " N"], recipe: Recipe
) -> tuple[Float[Array, "B T"], Float[Array, "N K"], Float[Array, "N K"], Float[Array, "N K"]]:
    """Estimates and modulates; returns the tokens' advantages, and of the turns: base, advantages, factors.

    Args:
      batch: with penalised returns.
      scores: of the same rows.
      turns: the table of turns.
      active: trajectories of groups with different returns.
      recipe: the algorithm.
    """
    place = (batch.loss_mask, batch.trajectory_ids, batch.turn_ids)
    if recipe.estimator is not None:
        base = jnp.where(turns.mask, recipe.estimator(batch, turns.mask, recipe), 0)
        advantages, factors = modulate(base, turns, batch, active, recipe)
        return turns_to_tokens(advantages, *place), base, advantages, factors
    assert recipe.token_estimator is not None  # a recipe has one of the two
    token_base = recipe.token_estimator(batch, scores, recipe)
    size: dict[str, Any] = {"num_trajectories": turns.mask.shape[0], "num_turns": turns.mask.shape[1]}
    base, _ = compute_turn_entropies(token_base, *place, **size)
    advantages, factors = modulate(base, turns, batch, active, recipe)
    # Inside a turn the factor scales; bonus and centring shift all of its tokens alike.
    shift = turns_to_tokens(advantages - base * factors, *place)
    return token_base * turns_to_tokens(factors, *place) + shift, base, advantages, factors


def accepted_tokens(batch: Batch, scores: Scores, recipe: Recipe) -> Bool[Array, "B T"]:
    """The loss mask, less what masked importance sampling rejects."""
    if recipe.correction.kind != "mis":
        return batch.loss_mask
    return mis_mask(
        scores.old_logprobs,
        batch.behavior_logprobs,
        batch.loss_mask,
        low=recipe.correction.low,
        high=recipe.correction.high,
        level=recipe.correction.level,
        sequence_ids=batch.sequence_ids,
    )


def make_credit(recipe: Recipe, *, num_minibatches: int = 1) -> Callable[[Batch, Scores], Credit]:
    """Builds credit assignment: penalties, estimator, modulation, tokens, weights, and metrics of all that.

    Args:
      recipe: the algorithm.
      num_minibatches: optimizer steps that the batch is split into.
    """

    def credit(batch: Batch, scores: Scores) -> Credit:
        batch = drop_absent(batch)
        mask = batch.loss_mask
        turns = make_turns(batch, scores)
        active = has_spread(batch.returns, batch.group_ids)  # before the penalties, as dynamic sampling does
        shaped = replace_fields(batch, returns=shape_returns(batch, turns, recipe))
        tokens, base, advantages, factors = assign(shaped, scores, turns, active, recipe)
        kept = accepted_tokens(batch, scores, recipe)
        weights = minibatch_weights(
            kept,
            batch.minibatch_ids,
            num_minibatches,
            mode=recipe.loss_aggregation,
            sequence_ids=batch.sequence_ids,
            scale=recipe.loss_scale,
        ).astype(jnp.float32)
        metrics = credit_metrics(base, advantages, factors, turns.entropies, turns.mask)
        metrics |= {
            "mixed_groups": mixed_group_share(batch.returns, batch.group_ids),
            "behavior_ess": effective_sample_size(scores.old_logprobs, batch.behavior_logprobs, mask),
            "correction_kept": masked_mean(kept.astype(jnp.float32), mask),
            "entropy_drift_predicted": predicted_entropy_drift(
                tokens, scores.old_logprobs, scores.entropies, mask
            ),
        }
        targets = None
        if recipe.value_targets is not None:
            targets = recipe.value_targets(shaped, scores, recipe).astype(jnp.float32)
            metrics["explained_variance"] = explained_variance(scores.values, targets, mask)
        metrics = {name: value.astype(jnp.float32) for name, value in metrics.items()}
        table = TurnCredit(
            entropies=turns.entropies,
            base=base,
            factors=factors,
            bonuses=turn_bonuses(turns, batch, active, recipe),
            advantages=advantages,
            mask=turns.mask,
        )
        result = Credit(tokens.astype(jnp.float32), weights, metrics, turns=table, value_targets=targets)
        return jax.lax.stop_gradient(result)

    return credit


def correct_loss(
    values: Float[Array, "B T"],
    logprobs: Float[Array, "B T"],
    rows: Batch,
    scores: Scores,
    advantages: Float[Array, "B T"],
    recipe: Recipe,
) -> Float[Array, "B T"]:
    """Applies what multiplies the clipped loss: truncated weights, and the mask of sequences left behind.

    Args:
      values: policy loss per token.
      logprobs: of the policy being trained.
      rows: any rows of the batch; a sequence never spans rows, so rows suffice.
      scores: of the same rows.
      advantages: of the same rows.
      recipe: what to correct.
    """
    mask, settings = rows.loss_mask, recipe.correction
    if settings.kind == "tis":
        values = values * tis_weights(
            scores.old_logprobs,
            rows.behavior_logprobs,
            mask,
            cap=settings.cap,
            level=settings.level,
            sequence_ids=rows.sequence_ids,
        )
    if settings.sequence_delta is not None:
        kept = offpolicy_sequence_mask(
            logprobs, scores.old_logprobs, advantages, mask, rows.sequence_ids, delta=settings.sequence_delta
        )
        values = jnp.where(kept, values, 0)
    return values


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
        values = correct_loss(values, logprobs, batch_rows, scores_rows, advantages, recipe)
        change = log_ratio(logprobs, scores_rows.old_logprobs)
        metrics |= {
            "policy_loss": values,
            "ratio": jnp.exp(change),
            "approx_kl": jnp.expm1(change) - change,  # k3 of the policy before the update to the one trained
        }
        if recipe.kl_coef:
            metrics["kl"] = kl_penalty(logprobs, scores_rows.ref_logprobs, kind=recipe.kl_kind)
            values = values + recipe.kl_coef * metrics["kl"]
        if recipe.entropy_coef:
            values = values - recipe.entropy_coef * entropies
        return jnp.where(mask, values, 0), jax.lax.stop_gradient(metrics)

    return loss


def make_value_loss(recipe: Recipe) -> Callable[..., LossResult]:
    """Builds the critic's loss per token: value_coef · clipped squared error.

    Args:
      recipe: the algorithm.
    """

    def critic_loss(
        values: Float[Array, "B T"],
        batch_rows: Batch,
        scores_rows: Scores,
        value_targets: Float[Array, "B T"],
    ) -> LossResult:
        mask = batch_rows.loss_mask
        streams = (jnp.where(mask, x, 0) for x in (values, scores_rows.values, value_targets))
        loss = value_loss(*streams, clip=recipe.critic.value_clip)
        metrics = jax.lax.stop_gradient({"value_loss": loss, "value_mean": values})
        return recipe.critic.value_coef * loss, metrics

    return critic_loss


def build(recipe: Recipe, *, num_minibatches: int = 1) -> Algorithm:
    """The pure functions of a recipe.

    Args:
      recipe: the algorithm.
      num_minibatches: optimizer steps that each batch is split into, at least 1.

    Raises:
      ValueError: for fewer than one mini-batch.
    """
    if num_minibatches < 1:
        raise ValueError(f"num_minibatches={num_minibatches} must be at least 1")
    return Algorithm(
        credit=make_credit(recipe, num_minibatches=num_minibatches),
        loss=make_loss(recipe),
        value_loss=None if recipe.value_targets is None else make_value_loss(recipe),
    )
