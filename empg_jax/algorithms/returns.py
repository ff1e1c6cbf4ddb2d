"""Functions that run along time: one padded sequence per row ``[S, L]``, skipping masked tokens.

A masked token (an observation, padding) is passed through: it neither discounts nor resets what comes after
it, so a packed multi-turn row gives what its sampled tokens alone would give. Where a row holds several
episodes, ``ends`` marks the last token of each. All results are constants.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real, Shaped

from empg_jax.algorithms.masking import (
    Arr,
    Scalar,
    as_floats,
    as_mask,
    check_shapes,
    next_valid_values,
    whiten,
)


def backward_sums(values: Float[Array, "S L"], decays: Float[Array, "S L"]) -> Float[Array, "S L"]:
    """Compute y_j = x_j + d_j · y_{j+1} in log(L) parallel steps.

    Args:
      values: x.
      decays: d; 0 cuts a row into independent sequences, 1 with a zero value passes through.
    """

    def combine(
        later: tuple[Float[Array, "S M"], Float[Array, "S M"]],
        earlier: tuple[Float[Array, "S M"], Float[Array, "S M"]],
    ) -> tuple[Float[Array, "S M"], Float[Array, "S M"]]:
        return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]

    return jax.lax.associative_scan(combine, (decays, values), reverse=True, axis=1)[1]


def token_decays(
    valid: Bool[Array, "S L"], ends: Shaped[Arr, "S L"] | None, decay: Float[Array, ""]
) -> Float[Array, "S L"]:
    """Compute the decays for `backward_sums`: the decay at valid tokens, 0 at ends, 1 at masked tokens."""
    decays = jnp.where(valid, decay, 1)
    return decays if ends is None else jnp.where(as_mask(ends), 0, decays)


def discounted_returns(
    rewards: Real[Arr, "S L"],
    mask: Shaped[Arr, "S L"],
    *,
    gamma: Scalar,
    ends: Shaped[Arr, "S L"] | None = None,
) -> Float[Array, "S L"]:
    """Compute discounted reward-to-go over valid tokens: G_j = r_j + γ G_next.

    Args:
      rewards: per token; read under the mask only.
      mask: valid tokens.
      gamma: γ, applied once per valid token.
      ends: last tokens of episodes, for rows that hold several; None = a row is one.

    Returns:
      [S, L], 0 off the mask.

    Raises:
      ValueError: for different shapes.
    """
    check_shapes(rewards=rewards, mask=mask)
    (rewards,) = as_floats(jax.lax.stop_gradient(rewards))
    valid = as_mask(mask)
    decays = token_decays(valid, ends, jnp.asarray(gamma, rewards.dtype))
    return jnp.where(valid, backward_sums(jnp.where(valid, rewards, 0), decays), 0)


def gae(
    token_rewards: Real[Arr, "S L"],
    values: Real[Arr, "S L"],
    mask: Shaped[Arr, "S L"],
    *,
    gamma: Scalar = 1.0,
    lam: Scalar = 1.0,
    ends: Shaped[Arr, "S L"] | None = None,
) -> tuple[Float[Array, "S L"], Float[Array, "S L"]]:
    """Estimate generalized advantages over valid tokens (GAE).

        δ_j = r_j + γ V_next − V_j,   A_j = δ_j + γ λ A_next,   return_j = A_j + V_j

    "Next" is the next valid token; the value after the last one of an episode is 0. The advantages are not
    whitened: PPO does so afterwards (`whiten`). Source: https://arxiv.org/abs/1506.02438.

    Args:
      token_rewards: per token; read under the mask only.
      values: the critic's, before the update; read under the mask only.
      mask: valid tokens.
      gamma: γ.
      lam: λ.
      ends: last tokens of episodes, for rows that hold several; None = a row is one.

    Returns:
      ``(advantages, returns)``, each [S, L], 0 off the mask.

    Raises:
      ValueError: for different shapes.
    """
    check_shapes(token_rewards=token_rewards, values=values, mask=mask)
    rewards, values = as_floats(jax.lax.stop_gradient(token_rewards), jax.lax.stop_gradient(values))
    valid = as_mask(mask)
    gamma, lam = jnp.asarray(gamma, values.dtype), jnp.asarray(lam, values.dtype)
    values = jnp.where(valid, values, 0)
    following = next_valid_values(values, valid)
    if ends is not None:
        following = jnp.where(as_mask(ends), 0, following)
    deltas = jnp.where(valid, rewards, 0) + gamma * following - values
    sums = backward_sums(jnp.where(valid, deltas, 0), token_decays(valid, ends, gamma * lam))
    advantages = jnp.where(valid, sums, 0)
    return advantages, advantages + values


def reinforce_pp(
    token_rewards: Real[Arr, "S L"], mask: Shaped[Arr, "S L"], *, gamma: Scalar = 1.0
) -> Float[Array, "S L"]:
    """Compute REINFORCE++: discounted reward-to-go, whitened over all valid tokens of the batch.

    For the baseline form, put the return less its group's mean on the last token. A KL penalty inside the
    reward is ``token_rewards − β (old_logprobs − ref_logprobs)``. Source: https://arxiv.org/abs/2501.03262.

    Args:
      token_rewards: usually the outcome on the last token; read under the mask only.
      mask: valid tokens.
      gamma: γ.

    Returns:
      [S, L], 0 off the mask.

    Raises:
      ValueError: for different shapes.
    """
    return whiten(discounted_returns(token_rewards, mask, gamma=gamma), mask)
