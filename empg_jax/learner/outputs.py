"""What one forward pass of packed rows says of every token: log-probability, entropy, value."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from empg_jax.models.decoder import DecoderConfig, compute_values, forward, output_embedding
from empg_jax.models.head import compute_head
from empg_jax.types import Params


def compute_logprobs(
    params: Params,
    model: DecoderConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    temperature: float = 1.0,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of every token given the tokens before it, and the entropy it was drawn from.

    Arguments and alignment are those of `compute_outputs`.

    Returns:
      ``(logprobs, entropies)``, float32, entropies in nats.
    """
    return compute_outputs(params, model, tokens, positions, segment_ids, temperature)[:2]


def compute_outputs(
    params: Params,
    model: DecoderConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    temperature: float = 1.0,
    *,
    has_critic: bool = False,
    detach_critic: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"] | None]:
    """What one forward pass says of every token: log-probability, entropy and, with a critic, value.

    The one place where the shift by one happens: what position ``t - 1`` predicts is stored at ``t``.
    Position 0 holds zeros. A token that starts a segment is scored against its neighbour's state and must
    be masked (it never is a sampled token: every response follows a prompt).

    Args:
      params: stacked parameters.
      model: decoder config.
      tokens: packed rows.
      positions: position inside the segment.
      segment_ids: packed sequence in the row.
      temperature: the rollout temperature; divides the logits.
      has_critic: also the value of the state that each token was drawn in.
      detach_critic: the value's gradient stops at the head.

    Returns:
      ``(logprobs, entropies, values)``, float32, entropies in nats; values None without a critic.
    """
    hidden = forward(params, model, tokens, positions, segment_ids)
    weights = output_embedding(params).astype(model.dtype)
    # Rolled, not cut: where time is split over devices, all of them keep equal parts.
    predicted = jnp.roll(tokens, -1, axis=1)
    logprobs, entropies = compute_head(hidden, weights, predicted, temperature)
    state = jax.lax.stop_gradient(hidden) if detach_critic else hidden
    values = _shift(compute_values(params, state)) if has_critic else None
    return _shift(logprobs), _shift(entropies), values


def _shift(predictions: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """What position ``t`` says of the next token, stored at ``t + 1``; zeros at 0."""
    is_first = jnp.arange(predictions.shape[1])[None, :] == 0
    return jnp.where(is_first, jnp.float32(0.0), jnp.roll(predictions, 1, axis=1))
