"""Policy objectives that clip the probability ratio: of a token, of a turn, of a sequence, of stale data.

Per-token losses, not masked and not averaged; `loss_weights` does both. Gradients flow through ``logprobs``
alone. Log ratios are clamped before ``exp``, so finite junk at untrained tokens stays finite.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real

from empg_jax.algorithms.masking import Arr, Scalar, as_floats, as_ids, check_choice, check_shapes
from empg_jax.algorithms.segments import rank_ids, segment_means, segment_totals

MAX_LOG_RATIO = 20.0
STALE_MODES = ("mask", "clamp")
TURN_RATIOS = ("mean", "product")


def policy_streams(*streams: Real[Arr, "*shape"]) -> tuple[Float[Array, "*shape"], ...]:
    """Bring all to one floating type; everything but the first is a constant to the gradient."""
    first, *others = as_floats(*streams)
    return (first, *(jax.lax.stop_gradient(other) for other in others))


def log_ratio(
    logprobs: Float[Array, "*shape"], old_logprobs: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Compute ``logprobs − old_logprobs`` clamped to ±20, so that its exponential is finite."""
    return jnp.clip(logprobs - old_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def clip_ratio(ratios: Float[Array, "*shape"], clip_low: Scalar, clip_high: Scalar) -> Float[Array, "*shape"]:
    """Keep the ratio in [1 − clip_low, 1 + clip_high]; inside, ``jnp.clip`` passes the gradient."""
    dtype = ratios.dtype
    return jnp.clip(ratios, 1 - jnp.asarray(clip_low, dtype), 1 + jnp.asarray(clip_high, dtype))


def clipped_surrogate(
    ratios: Float[Array, "*shape"], advantages: Float[Array, "*shape"], clip_low: Scalar, clip_high: Scalar
) -> Float[Array, "*shape"]:
    """Compute ``max(−A r, −A clip(r, 1−lo, 1+hi))``; on-policy ties (r = 1) keep the whole gradient."""
    return jnp.maximum(-advantages * ratios, -advantages * clip_ratio(ratios, clip_low, clip_high))


def ppo_clip(
    logprobs: Real[Arr, "*shape"],
    old_logprobs: Real[Arr, "*shape"],
    advantages: Real[Arr, "*shape"],
    *,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    dual_clip: Scalar | None = 3.0,
) -> Float[Array, "*shape"]:
    """Compute the clipped surrogate of PPO, with dual clip; with ``clip_high=0.28``, DAPO's clip-higher.

        l = max(−A r, −A clip(r, 1−lo, 1+hi));   A < 0: l = min(l, −A c)

    Sources: PPO, https://arxiv.org/abs/1707.06347; dual clip, https://arxiv.org/abs/1912.09729; DAPO,
    https://arxiv.org/abs/2503.14476.

    Args:
      logprobs: of the policy being trained; the only stream with a gradient.
      old_logprobs: of the policy before the update.
      advantages: per token; all streams have one shape, usually [B, T].
      clip_low: lo.
      clip_high: hi.
      dual_clip: c, above 1; None switches it off.

    Returns:
      Loss per token, not masked.

    Raises:
      ValueError: for ``dual_clip`` not above 1 or different shapes.
    """
    check_dual_clip(dual_clip)
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    logprobs, old_logprobs, advantages = policy_streams(logprobs, old_logprobs, advantages)
    ratios = jnp.exp(log_ratio(logprobs, old_logprobs))
    loss = clipped_surrogate(ratios, advantages, clip_low, clip_high)
    if dual_clip is None:
        return loss
    bound = -advantages * jnp.asarray(dual_clip, loss.dtype)
    return jnp.where(advantages < 0, jnp.minimum(loss, bound), loss)


def check_dual_clip(dual_clip: Scalar | None) -> None:
    """Raise ValueError for a bound that would cut the unclipped range (traced values go unchecked)."""
    if dual_clip is not None and not isinstance(dual_clip, jax.core.Tracer) and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} must be above 1, or None to switch it off")


def segment_log_ratio(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    ratio: str = "mean",
) -> Float[Array, "B T"]:
    """Average or sum each segment's log ratio in value; the own token's log-prob in gradient; 0 at id -1.

    Args:
      logprobs: of the policy being trained.
      old_logprobs: of the policy before the update.
      segment_ids: arbitrary ids; -1 = a token that does not count.
      ratio: ``"mean"`` or ``"product"`` of the tokens' ratios.
    """
    counted = segment_ids >= 0
    logprobs = jnp.where(counted, logprobs, 0)  # before the subtraction: infinite junk must not reach it
    change = jax.lax.stop_gradient(logprobs) - jnp.where(counted, old_logprobs, 0)
    together = segment_means if ratio == "mean" else segment_totals
    return together(change, rank_ids(segment_ids)) + (logprobs - jax.lax.stop_gradient(logprobs))


def _segment_clip(
    logprobs: Real[Arr, "B T"],
    old_logprobs: Real[Arr, "B T"],
    advantages: Real[Arr, "B T"],
    segment_ids: Int[Arr, "B T"],
    *,
    clip_low: Scalar,
    clip_high: Scalar,
    ratio: str = "mean",
) -> Float[Array, "B T"]:
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, segment_ids=segment_ids)
    logprobs, old_logprobs, advantages = policy_streams(logprobs, old_logprobs, advantages)
    ids = as_ids(segment_ids)
    change = segment_log_ratio(logprobs, old_logprobs, ids, ratio=ratio)
    ratios = jnp.exp(jnp.minimum(change, 10.0))
    return clipped_surrogate(ratios, jnp.where(ids >= 0, advantages, 0), clip_low, clip_high)


def gspo(
    logprobs: Real[Arr, "B T"],
    old_logprobs: Real[Arr, "B T"],
    advantages: Real[Arr, "B T"],
    sequence_ids: Int[Arr, "B T"],
    *,
    clip_low: Scalar = 3e-4,
    clip_high: Scalar = 4e-4,
) -> Float[Array, "B T"]:
    """Compute Group Sequence Policy Optimization in its token form.

        s_i = exp(mean_t log r_it);   l = max(−A s_i, −A clip(s_i, 1−lo, 1+hi));   ∂s_i/∂logprob_t = s_i

    With one advantage per sequence, averaged by ``seq-mean-token-mean``, its gradient is that of the sequence
    objective; with per-turn advantages it is GSPO-token. Source: https://arxiv.org/abs/2507.18071.

    Args:
      logprobs: of the policy being trained; the only stream with a gradient.
      old_logprobs: of the policy before the update.
      advantages: per token, may differ between the turns of a sequence.
      sequence_ids: arbitrary ids; -1 at every token that does not count (observations, padding).
      clip_low: lo.
      clip_high: hi.

    Returns:
      Loss per token, 0 where the id is -1.

    Raises:
      ValueError: for different shapes.
    """
    streams = (logprobs, old_logprobs, advantages, sequence_ids)
    return _segment_clip(*streams, clip_low=clip_low, clip_high=clip_high)


def turn_ratio_clip(
    logprobs: Real[Arr, "B T"],
    old_logprobs: Real[Arr, "B T"],
    advantages: Real[Arr, "B T"],
    turn_sequence_ids: Int[Arr, "B T"],
    *,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    ratio: str = "mean",
) -> Float[Array, "B T"]:
    """Compute GSPO with one ratio per turn, as frameworks with one row per turn compute it.

        s = exp(mean_t log r_t) over the tokens of the turn, or their product;   ∂s/∂logprob_t = s

    Sources: the turn as unit of the ratio, https://arxiv.org/abs/2511.20718; Turn-PPO,
    https://arxiv.org/abs/2512.17008; GAGPO and GRAFT train with it.

    Args:
      logprobs: of the policy being trained; the only stream with a gradient.
      old_logprobs: of the policy before the update.
      advantages: per token.
      turn_sequence_ids: arbitrary ids of the turns; -1 at every token that does not count.
      clip_low: lo.
      clip_high: hi.
      ratio: geometric ``"mean"`` of the tokens' ratios, or their ``"product"``: the probability ratio of the
        whole response, which leaves the range sooner the longer it is.

    Returns:
      Loss per token, 0 where the id is -1.

    Raises:
      ValueError: for an unknown ``ratio`` or different shapes.
    """
    check_choice("ratio", ratio, TURN_RATIOS)
    streams = (logprobs, old_logprobs, advantages, turn_sequence_ids)
    return _segment_clip(*streams, clip_low=clip_low, clip_high=clip_high, ratio=ratio)


def decoupled_ppo(
    logprobs: Real[Arr, "*shape"],
    old_logprobs: Real[Arr, "*shape"],
    behavior_logprobs: Real[Arr, "*shape"],
    advantages: Real[Arr, "*shape"],
    *,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    cap: Scalar = 5.0,
    mode: str = "mask",
) -> Float[Array, "*shape"]:
    """Compute decoupled PPO for stale data: clip against the proximal policy, weight by prox/behavior.

        u = π/prox, w = prox/behavior;   l = w · max(−A u, −A clip(u, 1−lo, 1+hi))

    Sources: https://arxiv.org/abs/2110.00641; AReaL, https://arxiv.org/abs/2505.24298.

    Args:
      logprobs: of the policy being trained; the only stream with a gradient.
      old_logprobs: of the proximal policy: the learner's weights before the update.
      behavior_logprobs: recorded when the token was sampled, maybe under older weights.
      advantages: per token.
      clip_low: lo.
      clip_high: hi.
      cap: largest w.
      mode: a token with w above the cap has loss 0 (``"mask"``; it stays in the loss's denominator), or its
        w is the cap (``"clamp"``).

    Returns:
      Loss per token, not masked.

    Raises:
      ValueError: for an unknown ``mode`` or different shapes.
    """
    check_choice("mode", mode, STALE_MODES)
    check_shapes(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        behavior_logprobs=behavior_logprobs,
        advantages=advantages,
    )
    logprobs, old_logprobs, behavior_logprobs, advantages = policy_streams(
        logprobs, old_logprobs, behavior_logprobs, advantages
    )
    weights = jnp.exp(log_ratio(old_logprobs, behavior_logprobs))
    cap = jnp.asarray(cap, weights.dtype)
    weights = jnp.where(weights > cap, 0, weights) if mode == "mask" else jnp.minimum(weights, cap)
    ratios = jnp.exp(log_ratio(logprobs, old_logprobs))
    return weights * clipped_surrogate(ratios, advantages, clip_low, clip_high)
