"""Per-token objectives, and the weights that turn them into one number.

An objective maps per-token arrays to a loss for each token; `loss_weights` holds mask and normaliser in one, so
that the training loss is ``sum(loss * weights)`` and any split into micro-batches only adds up.

Gradients flow through ``logprobs`` alone: the other streams are constants. Log ratios are clamped before ``exp``, so
finite junk at untrained tokens stays finite.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real, Shaped

from empg_jax.algorithms.masking import (
    Arr,
    Scalar,
    as_floats,
    as_ids,
    as_mask,
    check_choice,
    check_shapes,
    rank_ids,
)

KL_KINDS = ("k1", "k2", "k3", "k1+", "k3+")
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
MAX_LOG_RATIO = 20.0


def _policy_streams(*streams: Real[Arr, "B T"]) -> tuple[Float[Array, "B T"], ...]:
    """One type for all; everything but the first is a constant."""
    first, *others = as_floats(*streams)
    return (first, *(jax.lax.stop_gradient(other) for other in others))


def log_ratio(logprobs: Float[Array, "B T"], old_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """``logprobs − old_logprobs`` clamped to ±20, so that its exponential is finite."""
    return jnp.clip(logprobs - old_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_surrogate(
    ratios: Float[Array, "B T"], advantages: Float[Array, "B T"], clip_low: Scalar, clip_high: Scalar
) -> Float[Array, "B T"]:
    """``max(−A r, −A clip(r, 1−clip_low, 1+clip_high))``.

    ``jnp.clip`` passes the gradient inside the range, so on-policy ties of the two branches (r = 1) keep it whole.
    """
    dtype = ratios.dtype
    low, high = 1 - jnp.asarray(clip_low, dtype), 1 + jnp.asarray(clip_high, dtype)
    return jnp.maximum(-advantages * ratios, -advantages * jnp.clip(ratios, low, high))


def ppo_clip(
    logprobs: Real[Arr, "B T"],
    old_logprobs: Real[Arr, "B T"],
    advantages: Real[Arr, "B T"],
    *,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    dual_clip: Scalar | None = 3.0,
) -> Float[Array, "B T"]:
    """The clipped surrogate of PPO, with dual clip; with ``clip_high=0.28``, DAPO's clip-higher.

        l = max(−A r, −A clip(r, 1−lo, 1+hi));   A < 0: l = min(l, −A c)

    Sources: PPO, https://arxiv.org/abs/1707.06347; dual clip, https://arxiv.org/abs/1912.09729; DAPO,
    https://arxiv.org/abs/2503.14476.

    Args:
      logprobs: of the policy being trained; the only stream with a gradient.
      old_logprobs: of the policy before the update.
      advantages: per token.
      clip_low: lo.
      clip_high: hi.
      dual_clip: c, above 1; None switches it off.

    Returns:
      Loss per token, not masked.

    Raises:
      ValueError: for ``dual_clip`` not above 1 or different shapes.
    """
    if isinstance(dual_clip, float | int) and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} must be above 1, or None to switch it off")
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    logprobs, old_logprobs, advantages = _policy_streams(logprobs, old_logprobs, advantages)
    ratios = jnp.exp(log_ratio(logprobs, old_logprobs))
    loss = clipped_surrogate(ratios, advantages, clip_low, clip_high)
    if dual_clip is None:
        return loss
    bound = -advantages * jnp.asarray(dual_clip, loss.dtype)
    return jnp.where(advantages < 0, jnp.minimum(loss, bound), loss)


def kl_penalty(
    logprobs: Real[Arr, "B T"], ref_logprobs: Real[Arr, "B T"], *, kind: str = "k3"
) -> Float[Array, "B T"]:
    """Estimates of KL(policy ‖ reference) from one sampled token, with d = logprobs − ref_logprobs.

        k1 = d,   k2 = d²/2,   k3 = exp(−d) + d − 1   (−d clamped to ±20, k3 to ±10)

    k1 and k3 are unbiased values; the gradient of k2 is the right one for the reverse KL under on-policy sampling.
    ``"k1+"`` and ``"k3+"`` have the value of k1 or k3 and the gradient of k2.
    Source: http://joschu.net/blog/kl-approx.html.

    Args:
      logprobs: of the policy being trained.
      ref_logprobs: of the frozen reference; a constant.
      kind: one of ``k1``, ``k2``, ``k3``, ``k1+``, ``k3+``.

    Returns:
      KL per token, not masked.

    Raises:
      ValueError: for an unknown kind or different shapes.
    """
    check_choice("kind", kind, KL_KINDS)
    check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs)
    logprobs, ref_logprobs = _policy_streams(logprobs, ref_logprobs)
    difference = logprobs - ref_logprobs
    squared = difference**2 / 2
    if kind == "k2":
        return squared
    if kind.startswith("k1"):
        value = difference
    else:
        back = jnp.clip(-difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        value = jnp.clip(jnp.expm1(back) - back, -10, 10)  # expm1: no cancellation near d = 0
    if kind.endswith("+"):
        return jax.lax.stop_gradient(value) + (squared - jax.lax.stop_gradient(squared))
    return value


def loss_weights(
    loss_mask: Shaped[Arr, "B T"],
    *,
    mode: str = "token-mean",
    sequence_ids: Int[Arr, "B T"] | None = None,
    scale: Scalar | None = None,
) -> Float[Array, "B T"]:
    """Each token's share in the loss, so that the aggregated loss is ``sum(loss * weights)``.

    With n_i trained tokens in sequence i, B sequences that have any, and l the loss of a token:

        token-mean               Σ l / Σ n_i
        seq-mean-token-mean      (1/B) Σ_i (1/n_i) Σ_t l
        seq-mean-token-sum       (1/B) Σ_i Σ_t l
        seq-mean-token-sum-norm  Σ l / scale

    Call it on the whole mini-batch: micro-batches then only add up.

    Args:
      loss_mask: tokens that are trained.
      mode: one of the four above.
      sequence_ids: arbitrary ids, equal ids = one sequence, -1 = padding (weight 0 in every mode); None makes
        every row a sequence.
      scale: divisor of ``seq-mean-token-sum-norm``; the row length when None.

    Returns:
      Weights [B, T], 0 off the mask; all 0 when nothing is trained. The default float type
      (float32 unless x64 is on), whatever the type of the mask.

    Raises:
      ValueError: for an unknown mode, a ``scale`` that the mode does not use, or different shapes.
    """
    check_choice("mode", mode, AGGREGATIONS)
    if scale is not None and mode != "seq-mean-token-sum-norm":
        raise ValueError(f'scale is used by mode="seq-mean-token-sum-norm" only, not by {mode!r}')
    dtype = jnp.result_type(float)
    mask = as_mask(loss_mask)
    if sequence_ids is None:
        ids = jnp.broadcast_to(jnp.arange(mask.shape[0], dtype=jnp.int32)[:, None], mask.shape)
    else:
        check_shapes(loss_mask=loss_mask, sequence_ids=sequence_ids)
        ids = as_ids(sequence_ids)
    mask = mask & (ids >= 0)
    ones = mask.astype(dtype)
    if mode == "token-mean":
        return ones / jnp.maximum(jnp.sum(ones), 1)
    if mode == "seq-mean-token-sum-norm":
        return ones / jnp.asarray(mask.shape[1] if scale is None else scale, dtype)
    ids = jnp.where(mask, ids, -1)
    ids = ids if sequence_ids is None else rank_ids(ids)
    counts = jax.ops.segment_sum(ones.ravel(), jnp.maximum(ids, 0).ravel(), num_segments=mask.size)
    weights = ones / jnp.maximum(jnp.sum(counts > 0, dtype=dtype), 1)
    if mode == "seq-mean-token-sum":
        return weights
    return weights / jnp.maximum(counts[jnp.maximum(ids, 0)], 1)
