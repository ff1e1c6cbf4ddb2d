"""Corrections for data that another policy sampled: the engine's rounding, or older weights.

Weights and masks, all constants to the gradient. A token off the mask gets 0 (False).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real, Shaped

from empg_jax.algorithms.masking import (
    Arr,
    Scalar,
    as_floats,
    as_ids,
    as_mask,
    check_choice,
    check_shapes,
    masked_mean,
)
from empg_jax.algorithms.segments import segment_means, segment_totals, sequence_segments
from empg_jax.algorithms.surrogates import MAX_LOG_RATIO, log_ratio

LEVELS = ("token", "sequence", "sequence_mean")


def _counted(mask: Shaped[Arr, "B T"], sequence_ids: Int[Arr, "B T"] | None) -> Bool[Array, "B T"]:
    """Convert the mask to bool, without tokens that belong to no sequence."""
    valid = as_mask(mask)
    return valid if sequence_ids is None else valid & (as_ids(sequence_ids) >= 0)


def _correction_log_ratio(
    old_logprobs: Real[Arr, "B T"],
    behavior_logprobs: Real[Arr, "B T"],
    mask: Shaped[Arr, "B T"],
    level: str,
    sequence_ids: Int[Arr, "B T"] | None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Compute the log ratio of learner to sampler on a level, clamped to ±20, and the bool mask."""
    check_shapes(old_logprobs=old_logprobs, behavior_logprobs=behavior_logprobs, mask=mask)
    old, behavior = as_floats(jax.lax.stop_gradient(old_logprobs), jax.lax.stop_gradient(behavior_logprobs))
    valid = _counted(mask, sequence_ids)
    change = log_ratio(jnp.where(valid, old, 0), jnp.where(valid, behavior, 0))
    if level == "token":
        return change, valid
    segments = sequence_segments(valid, sequence_ids)
    change = (segment_totals if level == "sequence" else segment_means)(change, segments)
    return jnp.clip(change, -MAX_LOG_RATIO, MAX_LOG_RATIO), valid


def tis_weights(
    old_logprobs: Real[Arr, "B T"],
    behavior_logprobs: Real[Arr, "B T"],
    mask: Shaped[Arr, "B T"],
    *,
    cap: Scalar = 2.0,
    level: str = "token",
    sequence_ids: Int[Arr, "B T"] | None = None,
    normalize: bool = False,
) -> Float[Array, "B T"]:
    """Compute truncated importance weights: constants that multiply the loss after its clipping.

        token: w = min(e^{d_t}, cap);   sequence: w = min(e^{Σ_t d_t}, cap);   d = old − behavior

    Not to be used when ``old_logprobs`` are the sampler's own: then PPO's ratio already holds the correction.
    Source: verl's rollout correction, https://github.com/volcengine/verl (``docs/algo/rollout_corr.md``).

    Args:
      old_logprobs: of the learner before the update.
      behavior_logprobs: recorded by the sampler.
      mask: valid tokens; junk elsewhere is harmless.
      cap: largest weight.
      level: ``"token"``, ``"sequence"`` (the product) or ``"sequence_mean"`` (the geometric mean).
      sequence_ids: arbitrary ids, -1 = padding; None makes every row a sequence.
      normalize: divide by the mean weight, over tokens or over sequences as the level says.

    Returns:
      Weights [B, T], 0 off the mask.

    Raises:
      ValueError: for an unknown level or different shapes.
    """
    check_choice("level", level, LEVELS)
    change, valid = _correction_log_ratio(old_logprobs, behavior_logprobs, mask, level, sequence_ids)
    weights = jnp.where(valid, jnp.minimum(jnp.exp(change), jnp.asarray(cap, change.dtype)), 0)
    return (
        weights / mean_weight(weights, valid, level=level, sequence_ids=sequence_ids)
        if normalize
        else weights
    )


def mean_weight(
    weights: Float[Array, "B T"],
    mask: Shaped[Arr, "B T"],
    *,
    level: str,
    sequence_ids: Int[Arr, "B T"] | None = None,
) -> Float[Array, ""]:
    """Compute the mean weight, by which `tis_weights` normalizes; 1 when nothing is valid.

    Args:
      weights: not normalized, 0 off the mask.
      mask: valid tokens.
      level: over tokens, or over sequences where it is not ``"token"``.
      sequence_ids: arbitrary ids, -1 = padding; None makes every row a sequence.
    """
    valid = _counted(mask, sequence_ids)
    shares = valid.astype(weights.dtype)
    if level != "token":
        # Every token holds its sequence's weight: shares of 1/n_i make sequences weigh one.
        counts = segment_totals(shares, sequence_segments(valid, sequence_ids))
        shares = shares / jnp.maximum(counts, 1)
    total = jnp.sum(shares)
    mean = jnp.sum(weights * shares) / jnp.where(total > 0, total, 1)
    return jnp.where(mean > 0, mean, 1)


def mis_mask(
    old_logprobs: Real[Arr, "B T"],
    behavior_logprobs: Real[Arr, "B T"],
    mask: Shaped[Arr, "B T"],
    *,
    low: Scalar = 0.5,
    high: Scalar = 2.0,
    level: str = "token",
    sequence_ids: Int[Arr, "B T"] | None = None,
) -> Bool[Array, "B T"]:
    """Keep the tokens whose ratio lies in ``[low, high]``, ends included.

    Rejected tokens leave the mask *and* the denominator: use the result as ``loss_mask`` of `loss_weights`.
    Source: verl's rollout correction, as `tis_weights`.

    Args:
      old_logprobs: of the learner before the update.
      behavior_logprobs: recorded by the sampler.
      mask: valid tokens; junk elsewhere is harmless.
      low: smallest ratio learner/sampler that is kept.
      high: largest such ratio.
      level: unit of the ratio: ``"token"``, ``"sequence"`` (the product of its ratios) or ``"sequence_mean"``
        (their geometric mean).
      sequence_ids: arbitrary ids, -1 = padding; None makes every row a sequence.

    Returns:
      The mask that is left, [B, T].

    Raises:
      ValueError: for an unknown level or different shapes.
    """
    check_choice("level", level, LEVELS)
    change, valid = _correction_log_ratio(old_logprobs, behavior_logprobs, mask, level, sequence_ids)
    ratios = jnp.exp(change)
    return valid & (ratios >= jnp.asarray(low, ratios.dtype)) & (ratios <= jnp.asarray(high, ratios.dtype))


def offpolicy_sequence_mask(
    logprobs: Real[Arr, "B T"],
    old_logprobs: Real[Arr, "B T"],
    advantages: Real[Arr, "B T"],
    mask: Shaped[Arr, "B T"],
    sequence_ids: Int[Arr, "B T"] | None,
    *,
    delta: Scalar = 0.223,
) -> Bool[Array, "B T"]:
    """Drop sequences of negative advantage whose probability has already fallen far.

        drop i when mean_t A < 0 and mean_t (old − log π) > δ

    It multiplies the loss and leaves the denominator alone. Source: DeepSeek-V3.2,
    https://arxiv.org/abs/2512.02556, Eq. 9, where the old policy is the one that sampled: its log-probs show
    the engine's rounding and stale weights, the learner's recomputed ones show neither. A is read as the mean
    over the sequence.

    Args:
      logprobs: of the policy being trained; no gradient flows through the mask.
      old_logprobs: of the policy that sampled.
      advantages: per token.
      mask: valid tokens; junk elsewhere is harmless.
      sequence_ids: arbitrary ids, -1 = padding; None makes every row a sequence.
      delta: δ in nats; ln 1.25 by default.

    Returns:
      The mask that is left, [B, T].

    Raises:
      ValueError: for different shapes.
    """
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    new, old, advantages = as_floats(
        *(jax.lax.stop_gradient(x) for x in (logprobs, old_logprobs, advantages))
    )
    valid = _counted(mask, sequence_ids)
    new, old, advantages = (jnp.where(valid, x, 0) for x in (new, old, advantages))
    segments = sequence_segments(valid, sequence_ids)
    left = segment_means(old - new, segments) > jnp.asarray(delta, new.dtype)
    return valid & ~(left & (segment_means(advantages, segments) < 0))


def effective_sample_size(
    old_logprobs: Real[Arr, "B T"], behavior_logprobs: Real[Arr, "B T"], mask: Shaped[Arr, "B T"]
) -> Float[Array, ""]:
    """Compute the share of tokens that the ratios leave effective: (mean w)² / mean w², in (0, 1].

    Args:
      old_logprobs: of the learner before the update.
      behavior_logprobs: recorded by the sampler.
      mask: valid tokens.

    Returns:
      1 when learner and sampler agree; 0 when nothing is valid.
    """
    change, valid = _correction_log_ratio(old_logprobs, behavior_logprobs, mask, "token", None)
    # Ratios relative to the largest: the quotient is the same and nothing overflows.
    top = jnp.max(jnp.where(valid, change, -MAX_LOG_RATIO))
    weights = jnp.exp(change - top)
    square = masked_mean(weights**2, valid)
    return masked_mean(weights, valid) ** 2 / jnp.where(square > 0, square, 1)


def entropy_ratio_mask(
    entropies: Real[Arr, "B T"],
    old_entropies: Real[Arr, "B T"],
    mask: Shaped[Arr, "B T"],
    *,
    low: Scalar | None = 0.95,
    high: Scalar | None = 1.05,
) -> Bool[Array, "B T"]:
    """Mark the tokens whose distribution moved little since the update began (entropy ratio clipping).

        q = (H + 1e-8) / (H_old + 1e-8);   keep where low < q < high

    PPO's clip sees the sampled token only, an entropy sees the whole distribution. A token outside keeps the
    value of its loss and its place in the denominator, but has no gradient. In the first optimizer step of a
    batch q is 1, but for rounding: small entropies need both computed alike. Source: ERC,
    https://arxiv.org/abs/2512.05591, and https://github.com/Kwai-Klear/ERC.

    Args:
      entropies: of the policy being trained, in nats.
      old_entropies: of the policy before the update, at the same temperature and precision.
      mask: valid tokens.
      low: smallest ratio; None is no bound.
      high: largest ratio; None is no bound.

    Returns:
      Bool [B, T], False off the mask.

    Raises:
      ValueError: for different shapes.
    """
    check_shapes(entropies=entropies, old_entropies=old_entropies, mask=mask)
    new, old = as_floats(jax.lax.stop_gradient(entropies), jax.lax.stop_gradient(old_entropies))
    valid = as_mask(mask)
    ratio = (jnp.where(valid, new, 0) + 1e-8) / (jnp.where(valid, old, 0) + 1e-8)
    if low is not None:
        valid &= ratio > jnp.asarray(low, ratio.dtype)
    if high is not None:
        valid &= ratio < jnp.asarray(high, ratio.dtype)
    return valid
