"""Losses that do not clip a surrogate: REINFORCE, CISPO, SAPO, the critic's, and the KL penalty.

Per token, not masked and not averaged; `loss_weights` does both. Gradients flow through the first argument
alone.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from empg_jax.algorithms.masking import Arr, Scalar, check_choice, check_shapes
from empg_jax.algorithms.surrogates import MAX_LOG_RATIO, clip_ratio, log_ratio, policy_streams

KL_KINDS = ("k1", "k2", "k3", "k1+", "k3+", "k3_is")


def reinforce_loss(logprobs: Real[Arr, "*shape"], advantages: Real[Arr, "*shape"]) -> Float[Array, "*shape"]:
    """Compute the plain policy gradient, without ratio and clip: l = −A log π.

    Args:
      logprobs: of the policy being trained.
      advantages: per token.

    Returns:
      Loss per token, not masked.

    Raises:
      ValueError: for different shapes.
    """
    check_shapes(logprobs=logprobs, advantages=advantages)
    logprobs, advantages = policy_streams(logprobs, advantages)
    return -advantages * logprobs


def cispo(
    logprobs: Real[Arr, "*shape"],
    old_logprobs: Real[Arr, "*shape"],
    advantages: Real[Arr, "*shape"],
    *,
    clip_low: Scalar = 1.0,
    clip_high: Scalar = 0.28,
) -> Float[Array, "*shape"]:
    """Compute CISPO: the clipped ratio is a constant weight, so every token keeps a gradient.

        l = −sg(clip(r, 1−lo, 1+hi)) A log π

    Source: MiniMax-M1, https://arxiv.org/abs/2506.13585.

    Args:
      logprobs: of the policy being trained.
      old_logprobs: of the policy before the update.
      advantages: per token.
      clip_low: lo; 1 leaves the lower side open.
      clip_high: hi.

    Returns:
      Loss per token, not masked.

    Raises:
      ValueError: for different shapes.
    """
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    logprobs, old_logprobs, advantages = policy_streams(logprobs, old_logprobs, advantages)
    ratios = jnp.exp(log_ratio(jax.lax.stop_gradient(logprobs), old_logprobs))
    return -clip_ratio(ratios, clip_low, clip_high) * advantages * logprobs


def sapo(
    logprobs: Real[Arr, "*shape"],
    old_logprobs: Real[Arr, "*shape"],
    advantages: Real[Arr, "*shape"],
    *,
    tau_pos: Scalar = 1.0,
    tau_neg: Scalar = 1.05,
) -> Float[Array, "*shape"]:
    """Compute SAPO: a smooth gate in place of the clip.

        l = −(4/τ) sigmoid(τ (r − 1)) A,   τ by the sign of A

    Source: https://arxiv.org/abs/2511.20347.

    Args:
      logprobs: of the policy being trained.
      old_logprobs: of the policy before the update.
      advantages: per token.
      tau_pos: τ where A > 0.
      tau_neg: τ elsewhere.

    Returns:
      Loss per token, not masked.

    Raises:
      ValueError: for different shapes.
    """
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    logprobs, old_logprobs, advantages = policy_streams(logprobs, old_logprobs, advantages)
    ratios = jnp.exp(log_ratio(logprobs, old_logprobs))
    dtype = ratios.dtype
    tau = jnp.where(advantages > 0, jnp.asarray(tau_pos, dtype), jnp.asarray(tau_neg, dtype))
    return -(4 / tau) * jax.nn.sigmoid(tau * (ratios - 1)) * advantages


def value_loss(
    values: Real[Arr, "*shape"],
    old_values: Real[Arr, "*shape"],
    returns: Real[Arr, "*shape"],
    *,
    clip: Scalar | None = 0.5,
) -> Float[Array, "*shape"]:
    """Compute the critic's clipped squared error.

        l = ½ max((v − R)², (clip(v, v_old ± clip) − R)²)

    Source: PPO, https://arxiv.org/abs/1707.06347, as its implementations clip it.

    Args:
      values: of the critic being trained.
      old_values: of the critic before the update.
      returns: the targets (`gae`).
      clip: how far a value may move before the other branch binds; None switches it off.

    Returns:
      Loss per token, not masked.

    Raises:
      ValueError: for different shapes.
    """
    check_shapes(values=values, old_values=old_values, returns=returns)
    values, old_values, returns = policy_streams(values, old_values, returns)
    squared = (values - returns) ** 2
    if clip is not None:
        reach = jnp.asarray(clip, values.dtype)
        squared = jnp.maximum(
            squared, (jnp.clip(values, old_values - reach, old_values + reach) - returns) ** 2
        )
    return squared / 2


def kl_penalty(
    logprobs: Real[Arr, "*shape"],
    ref_logprobs: Real[Arr, "*shape"],
    *,
    kind: str = "k3",
    old_logprobs: Real[Arr, "*shape"] | None = None,
) -> Float[Array, "*shape"]:
    """Estimate KL(policy ‖ reference) from one sampled token, with d = logprobs − ref_logprobs.

        k1 = d,   k2 = d²/2,   k3 = exp(−d) + d − 1   (−d clamped to ±20, k3 to ±10)

    k1 and k3 are unbiased values; the gradient of k2 is the right one for the reverse KL under on-policy
    sampling. ``"k1+"`` and ``"k3+"`` have the value of k1 or k3 and the gradient of k2. ``"k3_is"`` is k3
    times the ratio of policy to sampler, with the gradient of both factors: value and gradient are unbiased
    under samples of ``old_logprobs``. Sources: http://joschu.net/blog/kl-approx.html; DeepSeek-V3.2,
    https://arxiv.org/abs/2512.02556, Eq. 7.

    Args:
      logprobs: of the policy being trained.
      ref_logprobs: of the frozen reference; a constant.
      kind: one of ``k1``, ``k2``, ``k3``, ``k1+``, ``k3+``, ``k3_is``.
      old_logprobs: of the policy that sampled; for ``k3_is`` alone.

    Returns:
      KL per token, not masked.

    Raises:
      ValueError: for an unknown kind, different shapes, or ``k3_is`` without ``old_logprobs``.
    """
    check_choice("kind", kind, KL_KINDS)
    if (kind == "k3_is") != (old_logprobs is not None):
        raise ValueError(f"kind={kind!r}: k3_is needs old_logprobs, and no other kind does")
    check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs)
    if old_logprobs is not None:
        check_shapes(logprobs=logprobs, old_logprobs=old_logprobs)
        weight = jnp.exp(log_ratio(*policy_streams(logprobs, old_logprobs)))
        return weight * kl_penalty(logprobs, ref_logprobs, kind="k3")
    logprobs, ref_logprobs = policy_streams(logprobs, ref_logprobs)
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
