"""Log-probability, entropy and value of every token, from one forward pass over packed rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from empg_jax.models.decoder import DecoderConfig, compute_values, forward, output_embedding
from empg_jax.models.filtering import NO_FILTER, TokenFilter
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
    """Compute the log-probability of every token, and the entropy of the distribution over the vocabulary.

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
    trunk_ids: Int[Array, "B T"] | None = None,
    token_filter: TokenFilter = NO_FILTER,
    loss_mask: Bool[Array, "B T"] | None = None,
    has_critic: bool = False,
    detach_critic: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"] | None]:
    """Compute log-probability, entropy and, with a critic, value of every token in one forward pass.

    The shift by one happens here and nowhere else: the prediction of position ``t - 1`` is stored at ``t``.
    Position 0 holds zeros. The first token of a segment is scored against the state of the token before
    it, in another segment, so it must be masked. It is never a sampled token, because every response follows
    a prompt, whose last token is never in a shared beginning (`sharing`).

    Args:
      params: stacked parameters.
      model: decoder config.
      tokens: packed rows.
      positions: position inside the segment.
      segment_ids: number of the packed sequence in the row, from 1; 0 is padding.
      temperature: the rollout temperature; divides the logits.
      trunk_ids: the segment of the row that each token's own one continues; None: there are none.
      token_filter: the rollouts' filter. Log-probabilities are those of the filtered distribution, so that
        their ratio to the sampler's is right; entropies are those of the whole one.
      loss_mask: the tokens whose log-prob and entropy are read; those of the others may be 0. None: all.
      has_critic: also compute the value of the state that each token was drawn in.
      detach_critic: stop the value's gradient at the head, so that it does not reach the decoder.

    Returns:
      ``(logprobs, entropies, values)``, float32, entropies in nats; values None without a critic.
    """
    hidden = forward(params, model, tokens, positions, segment_ids, trunk_ids)
    weights = output_embedding(params).astype(model.dtype)
    # Rolled, not sliced: where time is split over devices, every device keeps a part of equal length.
    predicted = jnp.roll(tokens, -1, axis=1)
    mask = None if loss_mask is None else jnp.roll(loss_mask, -1, axis=1)
    logprobs, entropies = compute_head(
        hidden, weights, predicted, temperature, mask=mask, token_filter=token_filter
    )
    state = jax.lax.stop_gradient(hidden) if detach_critic else hidden
    values = _shift(compute_values(params, state)) if has_critic else None
    return _shift(logprobs), _shift(entropies), values


def _shift(predictions: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Move the prediction of position ``t`` to ``t + 1``, the token that it is about; put zeros at 0."""
    is_first = jnp.arange(predictions.shape[1])[None, :] == 0
    return jnp.where(is_first, jnp.float32(0.0), jnp.roll(predictions, 1, axis=1))
