"""EMPG and AEM: turn advantages reweighted by how certain the policy was.

Both rest on one kernel, `compute_factors`: turn entropies are min-max normalised inside a scope, mapped through
``exp(−decay · Hn)`` and divided by their mean, so that the factors have mean 1 in the scope. EMPG adds a bonus for
a certain next turn and centres; AEM keeps the factor alone, with a dead zone.

Everything is a constant to the gradient and must be computed on the whole global batch, before any split.
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

SCOPES = ("batch", "group", "trajectory")
EMPG_CENTERS = ("turn", "none")


def scope_segments(scope: str, group_ids: Int[Array, " N"]) -> Int[Array, " N"]:
    """The segment of each trajectory in [0, N): all one, its group, or itself; -1 where absent.

    Args:
      scope: ``"batch"``, ``"group"`` or ``"trajectory"``.
      group_ids: in [0, N), -1 = absent.
    """
    check_choice("scope", scope, SCOPES)
    if scope == "group":
        return group_ids
    own = jnp.arange(group_ids.shape[0], dtype=jnp.int32)
    return jnp.where(group_ids >= 0, own if scope == "trajectory" else jnp.zeros_like(own), -1)


def compute_factors(
    turn_entropies: Float[Array, "N K"],
    turn_mask: Bool[Array, "N K"],
    segments: Int[Array, " N"],
    *,
    decay: Scalar,
    eps: Scalar = 0.0,
    min_range: Scalar = 0.0,
) -> tuple[Float[Array, "N K"], Float[Array, "N K"]]:
    """The shared kernel: normalised entropies and self-calibrating factors.

        Hn = (H − min_s) / (max_s − min_s + eps)
        factor = exp(−decay · Hn) / (mean_s exp(−decay · Hn) + eps)

    Args:
      turn_entropies: mean token entropy of each turn.
      turn_mask: turns that exist; others are not read.
      segments: the segment s of each trajectory in [0, N); -1 = absent.
      decay: strength; 0 gives factors of exactly 1.
      eps: guards both divisions.
      min_range: segments whose entropies span less than this keep factor 1.

    Returns:
      ``(factors, normalised)``, each [N, K], 0 off the mask.
    """
    dtype, num_segments = turn_entropies.dtype, segments.shape[0]
    mask = turn_mask & (segments >= 0)[:, None]
    home = jnp.maximum(segments, 0)
    decay, eps, min_range = (jnp.asarray(x, dtype) for x in (decay, eps, min_range))

    def spread(per_row: Float[Array, " N"]) -> Float[Array, "N 1"]:
        return per_row[home][:, None]

    row_low = jnp.min(jnp.where(mask, turn_entropies, jnp.inf), axis=1)
    row_high = jnp.max(jnp.where(mask, turn_entropies, -jnp.inf), axis=1)
    low = spread(jax.ops.segment_min(row_low, home, num_segments=num_segments))
    high = spread(jax.ops.segment_max(row_high, home, num_segments=num_segments))
    # Empty segments hold the infinite fills; they have no valid turn, so any finite number does.
    low, high = jnp.where(low <= high, low, 0), jnp.where(low <= high, high, 0)
    span = high - low
    scale = jnp.where(span + eps > 0, span + eps, 1)
    normalised = jnp.where(mask, (jnp.where(mask, turn_entropies, low) - low) / scale, 0)

    weights = jnp.where(mask, jnp.exp(-decay * normalised), 0)
    total = jax.ops.segment_sum(jnp.sum(weights, axis=1), home, num_segments=num_segments)
    count = jax.ops.segment_sum(jnp.sum(mask, axis=1, dtype=dtype), home, num_segments=num_segments)
    mean = spread(total / jnp.maximum(count, 1))
    factors = weights / jnp.where(mean + eps > 0, mean + eps, 1)
    neutral = (span < min_range) | (decay == 0)
    return jnp.where(mask, jnp.where(neutral, 1, factors), 0), normalised


def next_turn_values(values: Float[Array, "N K"], turn_mask: Bool[Array, "N K"]) -> Float[Array, "N K"]:
    """The value at the next valid turn of the same trajectory, across empty ones; 0 at the last and off the mask.

    Args:
      values: one value per turn.
      turn_mask: turns that exist.
    """
    num_turns = values.shape[1]
    places = jnp.where(turn_mask, jnp.arange(num_turns, dtype=jnp.int32)[None, :], num_turns)
    from_here = jax.lax.cummin(places, axis=1, reverse=True)
    after = jnp.concatenate([from_here[:, 1:], jnp.full_like(from_here[:, :1], num_turns)], axis=1)
    found = jnp.take_along_axis(values, jnp.minimum(after, num_turns - 1), axis=1)
    return jnp.where(turn_mask & (after < num_turns), found, 0)


def _prepare(
    advantages: Real[Arr, "N K"],
    turn_entropies: Real[Arr, "N K"],
    turn_mask: Shaped[Arr, "N K"],
    group_ids: Int[Arr, " N"] | None,
    scope: str,
) -> tuple[Float[Array, "N K"], Float[Array, "N K"], Bool[Array, "N K"], Int[Array, " N"]]:
    """Checks the inputs of a modulation, brings them to one type and drops absent rows from the mask."""
    check_choice("scope", scope, SCOPES)
    check_shapes(advantages=advantages, turn_entropies=turn_entropies, turn_mask=turn_mask)
    if group_ids is None:
        if scope == "group":
            raise ValueError('scope="group" needs group_ids (the task of each trajectory, in [0, N))')
        ids = jnp.zeros(advantages.shape[0], jnp.int32)
    elif group_ids.shape != advantages.shape[:1]:
        raise ValueError(f"group_ids must have shape {advantages.shape[:1]}, got {group_ids.shape}")
    else:
        ids = as_ids(group_ids)
    advantages, turn_entropies = as_floats(
        jax.lax.stop_gradient(advantages), jax.lax.stop_gradient(turn_entropies)
    )
    mask = as_mask(turn_mask) & (ids >= 0)[:, None]
    return jnp.where(mask, advantages, 0), turn_entropies, mask, ids


def empg(
    advantages: Real[Arr, "N K"],
    turn_entropies: Real[Arr, "N K"],
    turn_mask: Shaped[Arr, "N K"],
    *,
    k: Scalar = 1.0,
    k_future: Scalar = 1.0,
    zeta: Scalar = 0.1,
    scope: str = "batch",
    group_ids: Int[Arr, " N"] | None = None,
    center: str = "turn",
    eps: Scalar = 1e-8,
) -> Float[Array, "N K"]:
    """Entropy-Modulated Policy Gradients.

        g = exp(−k Hn) / mean exp(−k Hn),   f = exp(−k' Hn)
        A'_t = A_t g_t + ζ f_{t+1} − mean(A g + ζ f)

    The bonus reads the next valid turn of the same trajectory; the last turn has none. Source: EMPG,
    https://arxiv.org/abs/2509.09265.

    Args:
      advantages: base advantages of the turns.
      turn_entropies: mean token entropy of the turns, under the policy before the update.
      turn_mask: turns that exist; others are not read and get 0.
      k: strength of the scaling; 0 switches it off exactly.
      k_future: steepness of the bonus.
      zeta: weight of the bonus; 0 switches it off exactly.
      scope: where min, max and the mean of the factor are taken: ``"batch"`` (the paper), ``"group"`` or
        ``"trajectory"``. Centring is always over the batch: inside a trajectory it would erase the outcome.
      group_ids: needed for ``scope="group"``; in [0, N), -1 = absent row. Absent rows are dropped in every scope.
      center: ``"turn"`` subtracts the mean over the batch's turns, each turn weighing one; ``"none"`` does not.
      eps: guards the min-max and the mean.

    Returns:
      Advantages [N, K], 0 off the mask.

    Raises:
      ValueError: for an unknown choice, missing ``group_ids`` or different shapes.
    """
    check_choice("center", center, EMPG_CENTERS)
    advantages, entropies, mask, ids = _prepare(advantages, turn_entropies, turn_mask, group_ids, scope)
    factors, normalised = compute_factors(entropies, mask, scope_segments(scope, ids), decay=k, eps=eps)
    certainty = jnp.exp(-jnp.asarray(k_future, advantages.dtype) * normalised)
    bonus = jnp.asarray(zeta, advantages.dtype) * next_turn_values(certainty, mask)
    modulated = advantages * factors + bonus
    if center == "turn":
        modulated = modulated - masked_mean(modulated, mask)
    return jnp.where(mask, modulated, 0)


def aem(
    advantages: Real[Arr, "N K"],
    turn_entropies: Real[Arr, "N K"],
    turn_mask: Shaped[Arr, "N K"],
    *,
    group_ids: Int[Arr, " N"],
    lam: Scalar = 1.0,
    scope: str = "group",
    min_range: Scalar = 0.1,
) -> Float[Array, "N K"]:
    """Adaptive Entropy Modulation.

        α = exp(−λ Hn) / mean exp(−λ Hn),   A' = α A

    No bonus and no centring: the sign of every advantage is kept. Source: AEM, https://arxiv.org/abs/2605.00425.

    Args:
      advantages: base advantages of the turns.
      turn_entropies: mean token entropy of the turns, under the policy before the update.
      turn_mask: turns that exist; others are not read and get 0.
      group_ids: the task of each trajectory, in [0, N); -1 = absent row.
      lam: strength λ; 0 switches the modulation off exactly.
      scope: where min, max and mean are taken: ``"group"`` (the paper), ``"batch"`` or ``"trajectory"``.
      min_range: a scope whose entropies span less than this many nats keeps α = 1.

    Returns:
      Advantages [N, K], 0 off the mask.

    Raises:
      ValueError: for an unknown scope or different shapes.
    """
    advantages, entropies, mask, ids = _prepare(advantages, turn_entropies, turn_mask, group_ids, scope)
    factors, _ = compute_factors(entropies, mask, scope_segments(scope, ids), decay=lam, min_range=min_range)
    return advantages * factors
