"""Metrics of credit assignment: a few scalars for each batch, at negligible cost."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from empg_jax.algorithms.advantages import has_spread
from empg_jax.algorithms.kernel import Modulation
from empg_jax.algorithms.masking import masked_mean, masked_quantiles, masked_spread


def mixed_group_share(returns: Float[Array, " N"], group_ids: Int[Array, " N"]) -> Float[Array, ""]:
    """Compute the share of task groups whose returns differ: only these have group-relative advantages.

    Args:
      returns: episode returns.
      group_ids: in [0, N), -1 = absent.
    """
    spread = has_spread(returns, group_ids)
    size = group_ids.shape[0]
    home = jnp.where(group_ids >= 0, group_ids, size)
    groups = jnp.zeros(size + 1, bool).at[home].set(True)[:size]
    mixed = jnp.zeros(size + 1, bool).at[home].max(spread)[:size]
    return masked_mean(mixed.astype(jnp.float32), groups)


def credit_metrics(
    base: Float[Array, "N K"],
    modulated: Modulation,
    turn_entropies: Float[Array, "N K"],
    turn_mask: Bool[Array, "N K"],
    *,
    final: Float[Array, "N K"],
    trained: Bool[Array, "N K"],
) -> dict[str, Float[Array, ""]]:
    """Summarize credit in scalars. Means and shares weigh every turn alike.

    Args:
      base: advantages of the estimator.
      modulated: what the modulation made of them; factors g or α, 1 without modulation.
      turn_entropies: mean token entropy of each turn.
      turn_mask: turns that exist.
      final: advantages of the loss, after whitening and the division by a mean weight.
      trained: turns that the loss covers, which all but the entropies are of.
    """
    factors = modulated.factors
    # A modulation gives what it leaves out the factor 0 (`empg`: groups without a spread).
    scaled = trained & (factors != 0)

    def share(condition: Bool[Array, "N K"]) -> Float[Array, ""]:
        return masked_mean(condition.astype(jnp.float32), trained)

    h10, h50, h90 = masked_quantiles(turn_entropies, turn_mask, (0.1, 0.5, 0.9))
    f10, f90 = masked_quantiles(factors, scaled, (0.1, 0.9))
    exists = jnp.any(scaled)
    size, before = jnp.abs(modulated.advantages), jnp.abs(base)
    return {
        "turn_entropy_mean": masked_mean(turn_entropies, turn_mask),
        "turn_entropy_p10": h10,
        "turn_entropy_p50": h50,
        "turn_entropy_p90": h90,
        "modulation_mean": masked_mean(factors, scaled),
        "modulation_std": jnp.sqrt(masked_spread(factors, scaled)[1]),
        "modulation_min": jnp.where(exists, jnp.min(jnp.where(scaled, factors, jnp.inf)), 0),
        "modulation_max": jnp.where(exists, jnp.max(jnp.where(scaled, factors, -jnp.inf)), 0),
        "modulation_p10": f10,
        "modulation_p90": f90,
        "advantage_mean": masked_mean(final, trained),
        "advantage_std": jnp.sqrt(masked_spread(final, trained)[1]),
        "advantage_abs_mean": masked_mean(jnp.abs(final), trained),
        "advantage_sign_changed": share(modulated.advantages * base < 0),
        "advantage_changed_2x": share((before > 0) & ((size > 2 * before) | (2 * size < before))),
        "advantage_positive": share(final > 0),
        "advantage_negative": share(final < 0),
    }


def explained_variance(
    values: Float[Array, "B T"], targets: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Compute the share of the targets' variance that the critic's values explain.

        1 − Var(targets − values) / Var(targets)

    Args:
      values: the critic's, before the update.
      targets: the critic's regression targets.
      mask: sampled tokens.
    """
    left = masked_spread(jnp.where(mask, targets - values, 0), mask)[1]
    whole = masked_spread(targets, mask)[1]
    return jnp.where(whole > 0, 1 - left / jnp.where(whole > 0, whole, 1), 0)


def predicted_entropy_drift(
    advantages: Float[Array, "B T"],
    logprobs: Float[Array, "B T"],
    entropies: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    trained: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """Predict the entropy's drift by AEM's law: the mean over sampled tokens of A (S − H), S = −log π.

    Tokens that the loss does not cover are pushed nowhere: they count with 0. Positive when the batch pushes
    the policy's entropy up, in nats per unit of step size.
    Source: AEM, https://arxiv.org/abs/2605.00425; see `empg_jax.algorithms.theory.entropy_drift`.

    Args:
      advantages: per token, after modulation.
      logprobs: of the sampled tokens under the policy before the update.
      entropies: of the same policy.
      mask: sampled tokens.
      trained: those of them that the loss covers.
    """
    advantages, logprobs, entropies = (jnp.where(trained, x, 0) for x in (advantages, logprobs, entropies))
    return masked_mean(advantages * (-logprobs - entropies), mask)
