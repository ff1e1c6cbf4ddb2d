"""Corrections for tokens that another policy sampled: the engine's rounding, or older weights."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from empg_jax.algorithms import corrections
from empg_jax.algorithms.masking import NonNegative, Positive, check_choice
from empg_jax.algorithms.part import Correction, default_of
from empg_jax.types import Batch, Scores


def tis(
    *,
    cap: Positive = default_of(corrections.tis_weights, "cap"),
    level: Literal["token", "sequence", "sequence_mean"] = default_of(corrections.tis_weights, "level"),
    normalize: bool = default_of(corrections.tis_weights, "normalize"),
) -> Correction:
    """Bind `tis_weights`: the loss is multiplied by truncated weights.

    Args:
      cap: Largest weight of tis.
      level: Unit of the ratio; for a sequence, the product or the geometric mean of its ratios.
      normalize: Divide by the mean weight of the batch's trained tokens, so that weights of tis have mean 1.
    """
    check_choice("correction.level", level, corrections.LEVELS)

    def weights(rows: Batch, scores: Scores) -> Float[Array, "B T"]:
        streams = (scores.old_logprobs, rows.behavior_logprobs, rows.loss_mask)
        return corrections.tis_weights(*streams, cap=cap, level=level, sequence_ids=rows.sequence_ids)

    def weigh(
        logprobs: Float[Array, "B T"], rows: Batch, scores: Scores, advantages: Float[Array, "B T"]
    ) -> Float[Array, "B T"]:
        return weights(rows, scores)

    def mean_weight(batch: Batch, scores: Scores) -> Float[Array, ""]:
        return corrections.mean_weight(
            weights(batch, scores), batch.loss_mask, level=level, sequence_ids=batch.sequence_ids
        )

    options = {"cap": cap, "level": level, "normalize": normalize}
    return Correction("tis", options, weigh=weigh, mean_weight=mean_weight if normalize else None)


def mis(
    *,
    low: NonNegative = default_of(corrections.mis_mask, "low"),
    high: Positive = default_of(corrections.mis_mask, "high"),
    level: Literal["token", "sequence", "sequence_mean"] = default_of(corrections.mis_mask, "level"),
) -> Correction:
    """Bind `mis_mask`: tokens with a ratio beyond the range leave the loss and its denominator.

    Args:
      low: Smallest ratio that mis keeps.
      high: Largest ratio that mis keeps.
      level: Unit of the ratio; for a sequence, the product or the geometric mean of its ratios.
    """
    check_choice("correction.level", level, corrections.LEVELS)
    if low > high:
        raise ValueError(f"correction.low={low} must not exceed correction.high={high}")

    def accept(batch: Batch, scores: Scores) -> Bool[Array, "B T"]:
        return corrections.mis_mask(
            scores.old_logprobs,
            batch.behavior_logprobs,
            batch.loss_mask,
            low=low,
            high=high,
            level=level,
            sequence_ids=batch.sequence_ids,
        )

    return Correction("mis", {"low": low, "high": high, "level": level}, accept=accept)


def sequence_mask(
    *,
    delta: NonNegative = default_of(corrections.offpolicy_sequence_mask, "delta"),
    logprobs_of: Literal["sampler", "learner"] = "sampler",
) -> Correction:
    """Bind `offpolicy_sequence_mask`; the KL term and the denominator stay as they are.

    Args:
      delta: Drop a sequence of negative advantage that moved further than this (nats); null is off.
      logprobs_of: Policy whose log-probabilities are the start of the distance in sequence_delta.
    """
    check_choice("correction.sequence_logprobs", logprobs_of, ("sampler", "learner"))

    def weigh(
        logprobs: Float[Array, "B T"], rows: Batch, scores: Scores, advantages: Float[Array, "B T"]
    ) -> Float[Array, "B T"]:
        start = rows.behavior_logprobs if logprobs_of == "sampler" else scores.old_logprobs
        kept = corrections.offpolicy_sequence_mask(
            logprobs, start, advantages, rows.loss_mask, rows.sequence_ids, delta=delta
        )
        return kept.astype(jnp.float32)

    return Correction("sequence_mask", {"delta": delta, "logprobs_of": logprobs_of}, weigh=weigh)


def entropy_ratio(
    *,
    low: NonNegative | None = None,
    high: Positive | None = None,
) -> Correction:
    """Bind `entropy_ratio_mask`: tokens whose entropy moved too far leave the gradient, not the denominator.

    Args:
      low: Smallest ratio of a token's entropy to that before the update that still trains it; null is off.
      high: Largest such ratio; null is off.
    """
    if low is None and high is None:
        raise ValueError("correction.entropy_low and correction.entropy_high are both null: give one or both")
    if low is not None and high is not None and low >= high:
        raise ValueError(f"correction.entropy_low={low} must be below correction.entropy_high={high}")

    def limit(entropies: Float[Array, "B T"], rows: Batch, scores: Scores) -> Bool[Array, "B T"]:
        return corrections.entropy_ratio_mask(entropies, scores.entropies, rows.loss_mask, low=low, high=high)

    return Correction("entropy_ratio", {"low": low, "high": high}, limit=limit)
