"""Credit assignment on the whole global batch: penalties → estimator → modulation → tokens → weights."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from empg_jax.algorithms.contract import Keep, Modulation, Penalties, TokenCredit, Turns, Worth
from empg_jax.algorithms.corrections import effective_sample_size
from empg_jax.algorithms.diagnostics import (
    credit_metrics,
    explained_variance,
    mixed_group_share,
    predicted_entropy_drift,
)
from empg_jax.algorithms.masking import masked_mean, whiten
from empg_jax.algorithms.part import name_of
from empg_jax.algorithms.recipe import Recipe, check_clips
from empg_jax.algorithms.segments import compute_turn_entropies, count_turn_tokens, turns_to_tokens
from empg_jax.algorithms.timeline import last_turns
from empg_jax.types import Batch, Credit, Scores, TurnCredit


def drop_absent(batch: Batch) -> Batch:
    """Mark absent trajectories by group id -1, and mask their tokens and those of rows in no mini-batch."""
    group_ids = jnp.where(batch.trajectory_mask, batch.group_ids, -1)
    owner = group_ids[jnp.clip(batch.trajectory_ids, 0, group_ids.shape[0] - 1)]
    present = batch.loss_mask & (batch.minibatch_ids >= 0)[:, None] & (owner >= 0)
    return dataclasses.replace(batch, loss_mask=present, group_ids=group_ids)


def _size(batch: Batch) -> dict[str, Any]:
    """Return the size of the table of turns, by the names of its arguments."""
    num_trajectories, num_turns = batch.turn_valid.shape
    return {"num_trajectories": num_trajectories, "num_turns": num_turns}


def make_turns(batch: Batch, scores: Scores) -> Turns:
    """Gather the table of turns; rows of absent trajectories have no turn.

    Args:
      batch: with ``group_ids`` -1 where a trajectory is absent.
      scores: the entropies.
    """
    place, size = (batch.loss_mask, batch.trajectory_ids, batch.turn_ids), _size(batch)
    entropies, mask = compute_turn_entropies(scores.entropies, *place, **size)
    counts = count_turn_tokens(*place, **size).astype(jnp.float32)
    return Turns(entropies, mask & (batch.group_ids >= 0)[:, None], counts)


def compute_worth(batch: Batch, turns: Turns, penalties: tuple[Penalties, ...]) -> Worth:
    """Apply penalties and the rule about limits, in returns and in the table of turns alike.

    The rule: an episode in which the policy exceeded a limit has the return ``min(0, rewards and
    penalties)``. Its gains are subtracted from its last turn, so that exceeding a limit never pays. The
    return then includes its penalties, so a turn's score does not subtract them a second time.

    Args:
      batch: raw rewards.
      turns: which turns exist.
      penalties: what each part of the recipe takes off.
    """
    mask = turns.mask
    of_turns, of_episodes = jnp.zeros(mask.shape, jnp.float32), jnp.zeros(mask.shape[0], jnp.float32)
    for taken in penalties:
        of_turns = of_turns + jnp.where(mask, taken.turns, 0)
        of_episodes = of_episodes + taken.episodes
    raw = batch.returns.astype(jnp.float32)
    total = raw - jnp.sum(of_turns, axis=1) - of_episodes
    gained = jnp.where(batch.scored_zero, jnp.maximum(total, 0), 0)
    returns = total - gained
    off_last = jnp.where(last_turns(mask), (of_episodes + gained)[:, None], 0)
    own = raw[:, None] - of_episodes[:, None] - of_turns
    return Worth(
        returns=returns,
        turn_scores=jnp.where(mask, jnp.where(batch.scored_zero[:, None], returns[:, None], own), 0),
        turn_rewards=jnp.where(mask, batch.turn_rewards.astype(jnp.float32), 0) - off_last,
        turn_penalties=of_turns,
        mask=mask,
    )


def _checked(part: Any, values: Any, shape: tuple[int, ...], legend: str) -> Any:
    """Return the result of a part, if it is an array of the given shape.

    Raises:
      ValueError: naming the part.
    """
    found = getattr(values, "shape", None)
    if found != shape:
        what = type(values).__name__ if found is None else f"shape {tuple(found)}"
        raise ValueError(f"{name_of(part)} returned {what}; expected float{legend} = {shape}")
    return values


def _modulate(recipe: Recipe, base: Float[Array, "N K"], turns: Turns, batch: Batch) -> Modulation:
    """Apply the recipe's modulation, if it has one, to the turns that no filter leaves out."""
    plain = Modulation(base, jnp.where(turns.mask, jnp.ones_like(base), 0), jnp.zeros_like(base))
    if recipe.modulate is None:
        return plain
    filters = [keep for keep in recipe.keep if getattr(keep, "is_filter", False)]  # type: ignore[union-attr]
    seen = _covered(filters, turns, batch)
    found = recipe.modulate(base, turns._replace(mask=seen), batch)
    if not isinstance(found, Modulation):
        raise ValueError(
            f"{name_of(recipe.modulate)} returned {type(found).__name__}; expected a Modulation: advantages, "
            "factors, bonuses"
        )
    parts = (_checked(recipe.modulate, part, base.shape, "[N, K]") for part in found)
    return Modulation(*(jnp.where(seen, part, same) for part, same in zip(parts, plain, strict=True)))


def _covered(keeps: Iterable[Keep], turns: Turns, batch: Batch) -> Bool[Array, "N K"]:
    """Choose the turns that all of these parts keep."""
    covered = turns.mask
    for keep in keeps:
        covered = covered & _checked(keep, keep(batch, turns), turns.mask.shape, "[N, K]")
    return covered


def assign(
    recipe: Recipe, batch: Batch, scores: Scores, turns: Turns, worth: Worth
) -> tuple[TokenCredit, Float[Array, "N K"], Modulation]:
    """Estimate and modulate.

    Args:
      recipe: the algorithm.
      batch: with absent trajectories marked.
      scores: of the same rows.
      turns: the table of turns.
      worth: their returns and rewards after penalties.

    Returns:
      The tokens' advantages (and value targets); of the turns: base, and what modulation made of it, before
      whitening.
    """
    place = (batch.loss_mask, batch.trajectory_ids, batch.turn_ids)
    found = recipe.estimate(batch, scores, worth)
    if not isinstance(found, TokenCredit):
        base = jnp.where(turns.mask, _checked(recipe.estimate, found, turns.mask.shape, "[N, K]"), 0)
        modulated = _modulate(recipe, base, turns, batch)
        return TokenCredit(turns_to_tokens(modulated.advantages, *place)), base, modulated
    tokens = _checked(recipe.estimate, found.advantages, batch.loss_mask.shape, "[B, T]")
    if found.clip_scale is not None:
        _checked(recipe.estimate, found.clip_scale, batch.loss_mask.shape, "[B, T] as clip_scale")
        check_clips(recipe)
    base = _mean_of_turns(batch, tokens)
    modulated = _modulate(recipe, base, turns, batch)
    # Inside a turn the factor scales; bonus and centering shift all of its tokens alike.
    shift = turns_to_tokens(modulated.advantages - base * modulated.factors, *place)
    scaled = jnp.where(batch.loss_mask, tokens, 0) * turns_to_tokens(modulated.factors, *place) + shift
    if found.is_whitened:
        scaled = whiten(scaled, batch.loss_mask)
    return found._replace(advantages=scaled), base, modulated


def _mean_of_turns(batch: Batch, tokens: Float[Array, "B T"]) -> Float[Array, "N K"]:
    """Average the advantages of each turn's sampled tokens."""
    place = (batch.loss_mask, batch.trajectory_ids, batch.turn_ids)
    return compute_turn_entropies(tokens, *place, **_size(batch))[0]


def trained_tokens(
    recipe: Recipe, batch: Batch, scores: Scores, turns: Turns
) -> tuple[Bool[Array, "B T"], Bool[Array, "B T"]]:
    """Choose the sampled tokens that corrections accept, and those of them whose turn the loss covers."""
    accepted = batch.loss_mask
    for correction in recipe.correct:  # type: ignore[union-attr]
        if correction.accept is not None:
            accepted = accepted & correction.accept(batch, scores)
    covered = _covered(recipe.keep, turns, batch)  # type: ignore[arg-type]
    place = (batch.loss_mask, batch.trajectory_ids, batch.turn_ids)
    return accepted, accepted & (turns_to_tokens(covered.astype(jnp.float32), *place) > 0)


def make_credit(recipe: Recipe, *, num_minibatches: int = 1) -> Callable[[Batch, Scores], Credit]:
    """Build credit assignment, with loss weights, turn by turn credit and metrics of all that.

    Args:
      recipe: the algorithm.
      num_minibatches: optimizer steps that the batch is split into.
    """

    def credit(batch: Batch, scores: Scores) -> Credit:
        batch, scores = jax.tree.map(jnp.asarray, (batch, scores))  # the host's arrays are welcome
        batch = drop_absent(batch)
        mask = batch.loss_mask
        turns = make_turns(batch, scores)
        penalties = tuple(part(batch, turns) for part in recipe.penalise)  # type: ignore[union-attr]
        worth = compute_worth(batch, turns, penalties)
        tokens, base, modulated = assign(recipe, batch, scores, turns, worth)
        advantages, final = tokens.advantages, modulated.advantages
        if tokens.is_whitened:
            final = _mean_of_turns(batch, advantages)
        accepted, kept = trained_tokens(recipe, batch, scores, turns)
        for correction in recipe.correct:  # type: ignore[union-attr]
            if correction.mean_weight is not None:
                # As the loss has them: of the tokens that it covers.
                divisor = correction.mean_weight(dataclasses.replace(batch, loss_mask=kept), scores)
                advantages, final = advantages / divisor, final / divisor
        weights = recipe.aggregate(batch, kept, num_minibatches)  # type: ignore[operator]
        weights = _checked(recipe.aggregate, weights, mask.shape, "[B, T]").astype(jnp.float32)
        trained = count_turn_tokens(kept, batch.trajectory_ids, batch.turn_ids, **_size(batch)) > 0
        metrics = credit_metrics(base, modulated, turns.entropies, turns.mask, final=final, trained=trained)
        metrics |= {
            "mixed_groups": mixed_group_share(
                batch.returns, batch.group_ids
            ),  # raw, as dynamic sampling does
            "behavior_ess": effective_sample_size(scores.old_logprobs, batch.behavior_logprobs, mask),
            "correction_kept": masked_mean(accepted.astype(jnp.float32), mask),
            "loss_coverage": masked_mean(kept.astype(jnp.float32), mask),
            "entropy_drift_predicted": predicted_entropy_drift(
                advantages, scores.old_logprobs, scores.entropies, mask, kept
            ),
        }
        targets = tokens.value_targets if recipe.critic is not None else None
        if recipe.critic is not None:
            targets = _checked(recipe.estimate, targets, mask.shape, "[B, T] as value_targets")
            targets = targets.astype(jnp.float32)
            metrics["explained_variance"] = explained_variance(scores.values, targets, mask)
        table = TurnCredit(
            entropies=turns.entropies,
            base=base,
            factors=modulated.factors,
            bonuses=modulated.bonuses,
            advantages=final,
            mask=turns.mask,
        )
        result = Credit(
            advantages=advantages.astype(jnp.float32),
            loss_weights=weights,
            metrics={name: value.astype(jnp.float32) for name, value in metrics.items()},
            turns=table,
            value_targets=targets,
            clip_scale=tokens.clip_scale,
        )
        return jax.lax.stop_gradient(result)

    return credit
