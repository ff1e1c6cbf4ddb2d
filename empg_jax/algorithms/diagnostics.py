"""What a person wants to see of credit assignment, at negligible cost: scalars over turns and trajectories."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from empg_jax.algorithms.masking import masked_mean, masked_quantiles


def mixed_group_share(returns: Float[Array, " N"], group_ids: Int[Array, " N"]) -> Float[Array, ""]:
    """Share of the task groups whose returns differ; only these teach a group-relative estimator anything.

    Args:
      returns: episode returns.
      group_ids: in [0, N), -1 = absent.
    """
    valid, home, size = group_ids >= 0, jnp.maximum(group_ids, 0), group_ids.shape[0]
    low = jax.ops.segment_min(jnp.where(valid, returns, jnp.inf), home, num_segments=size)
    high = jax.ops.segment_max(jnp.where(valid, returns, -jnp.inf), home, num_segments=size)
    return masked_mean((low < high).astype(jnp.float32), low <= high)


def credit_metrics(
    base: Float[Array, "N K"],
    advantages: Float[Array, "N K"],
    factors: Float[Array, "N K"],
    turn_entropies: Float[Array, "N K"],
    turn_mask: Bool[Array, "N K"],
    returns: Float[Array, " N"],
    group_ids: Int[Array, " N"],
) -> dict[str, Float[Array, ""]]:
    """Scalars that describe one batch's credit. Means and shares are over turns, each weighing one.

    Args:
      base: advantages of the estimator.
      advantages: the same after modulation.
      factors: what the modulation multiplied them by (g or α; 1 without modulation).
      turn_entropies: mean token entropy of each turn.
      turn_mask: turns that exist.
      returns: episode returns.
      group_ids: in [0, N), -1 = absent.
    """

    def share(condition: Bool[Array, "N K"]) -> Float[Array, ""]:
        return masked_mean(condition.astype(jnp.float32), turn_mask)

    h10, h50, h90 = masked_quantiles(turn_entropies, turn_mask, (0.1, 0.5, 0.9))
    f10, f90 = masked_quantiles(factors, turn_mask, (0.1, 0.9))
    exists = jnp.any(turn_mask)
    size, before = jnp.abs(advantages), jnp.abs(base)
    metrics = {
        "turn_entropy_mean": masked_mean(turn_entropies, turn_mask),
        "turn_entropy_p10": h10,
        "turn_entropy_p50": h50,
        "turn_entropy_p90": h90,
        "modulation_mean": masked_mean(factors, turn_mask),
        "modulation_min": jnp.where(exists, jnp.min(jnp.where(turn_mask, factors, jnp.inf)), 0),
        "modulation_max": jnp.where(exists, jnp.max(jnp.where(turn_mask, factors, -jnp.inf)), 0),
        "modulation_p10": f10,
        "modulation_p90": f90,
        "advantage_mean": masked_mean(advantages, turn_mask),
        "advantage_abs_mean": masked_mean(size, turn_mask),
        "advantage_sign_changed": share(jnp.sign(advantages) != jnp.sign(base)),
        "advantage_changed_2x": share((size > 2 * before) | (2 * size < before)),
        "advantage_positive": share(advantages > 0),
        "advantage_negative": share(advantages < 0),
        "mixed_groups": mixed_group_share(returns, group_ids),
    }
    return {name: value.astype(jnp.float32) for name, value in metrics.items()}
