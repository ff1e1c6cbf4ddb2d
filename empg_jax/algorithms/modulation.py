"""EMPG and AEM: turn advantages reweighted by how certain the policy was.

Both rest on one kernel, `compute_factors`: turn entropies are min-max normalised inside a scope, mapped
through ``exp(−decay · Hn)`` and divided by their mean, so that the factors have mean 1 in the scope. EMPG
adds a bonus for a certain next turn and centres; AEM keeps the factor alone, with a dead zone.

Everything is a constant to the gradient and must be computed on the whole global batch, before any split.
"""

import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Real, Shaped, UInt32

from empg_jax.algorithms.masking import (
    Arr,
    Scalar,
    as_floats,
    as_ids,
    as_mask,
    check_choice,
    check_shapes,
    masked_mean,
    masked_spread,
    next_valid_values,
)

SCOPES = ("batch", "group", "trajectory")
CENTERS = ("turn", "token", "none")
MEANS = ("turn", "token")


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
    weights: Float[Array, "N K"] | None = None,
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
      weights: weight of each turn in the mean; None weighs every turn one.

    Returns:
      ``(factors, normalised)``, each [N, K], 0 off the mask.
    """
    dtype, num_segments = turn_entropies.dtype, segments.shape[0]
    mask = turn_mask & (segments >= 0)[:, None]
    home = jnp.maximum(segments, 0)
    decay, eps, min_range = (jnp.asarray(x, dtype) for x in (decay, eps, min_range))

    def spread(per_segment: Float[Array, " N"]) -> Float[Array, "N 1"]:
        return per_segment[home][:, None]

    row_low = jnp.min(jnp.where(mask, turn_entropies, jnp.inf), axis=1)
    row_high = jnp.max(jnp.where(mask, turn_entropies, -jnp.inf), axis=1)
    low = spread(jax.ops.segment_min(row_low, home, num_segments=num_segments))
    high = spread(jax.ops.segment_max(row_high, home, num_segments=num_segments))
    # Empty segments hold the infinite fills; they have no valid turn, so any finite number does.
    low, high = jnp.where(low <= high, low, 0), jnp.where(low <= high, high, 0)
    span = high - low
    scale = jnp.where(span + eps > 0, span + eps, 1)
    normalised = jnp.where(mask, (jnp.where(mask, turn_entropies, low) - low) / scale, 0)

    decayed = jnp.exp(-decay * normalised)
    shares = jnp.where(mask, jnp.ones_like(decayed) if weights is None else weights, 0)
    total = jax.ops.segment_sum(jnp.sum(decayed * shares, axis=1), home, num_segments=num_segments)
    count = jax.ops.segment_sum(jnp.sum(shares, axis=1), home, num_segments=num_segments)
    mean = spread(total / jnp.where(count > 0, count, 1))
    factors = decayed / jnp.where(mean + eps > 0, mean + eps, 1)
    neutral = (span < min_range) | (decay == 0)
    return jnp.where(mask, jnp.where(neutral, 1, factors), 0), normalised


def shuffle_in_segments(
    values: Float[Array, "N K"],
    turn_mask: Bool[Array, "N K"],
    segments: Int[Array, " N"],
    key: Key[Array, ""] | UInt32[Array, "2"],
) -> Float[Array, "N K"]:
    """Permutes the valid turns' values at random inside each segment; 0 off the mask.

    Args:
      values: one value per turn.
      turn_mask: turns that exist.
      segments: the segment of each trajectory in [0, N); -1 = absent.
      key: consumed.
    """
    mask = (turn_mask & (segments >= 0)[:, None]).ravel()
    home = jnp.where(mask, jnp.broadcast_to(segments[:, None], turn_mask.shape).ravel(), segments.shape[0])
    draws = jax.random.uniform(key, home.shape)
    here, there = jnp.argsort(home), jnp.lexsort((draws, home))  # the same segments, in two orders
    moved = jnp.zeros_like(values.ravel()).at[here].set(values.ravel()[there])
    return jnp.where(mask, moved, 0).reshape(values.shape)


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


def _token_weights(
    token_counts: Real[Arr, "N K"] | None, like: Float[Array, "N K"], choice: str
) -> Float[Array, "N K"]:
    """Token counts in the type of the computation; ``choice`` names the option that needs them."""
    if token_counts is None:
        raise ValueError(f"{choice} needs token_counts (sampled tokens of each turn, [N, K])")
    check_shapes(advantages=like, token_counts=token_counts)
    return jnp.asarray(token_counts).astype(like.dtype)


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
    token_counts: Real[Arr, "N K"] | None = None,
    active_mask: Shaped[Arr, " N"] | None = None,
    whiten: bool = False,
    eps: Scalar = 1e-8,
) -> Float[Array, "N K"]:
    """Entropy-Modulated Policy Gradients.

        g = exp(−k Hn) / mean exp(−k Hn),   f = exp(−k' Hn)
        A'_t = A_t g_t + ζ f_{t+1} − mean(A g + ζ f)

    The bonus reads the next valid turn of the same trajectory, across an empty one; the last turn has none.
    Source: EMPG, https://arxiv.org/abs/2509.09265.

    Args:
      advantages: base advantages of the turns.
      turn_entropies: mean token entropy of the turns, under the policy before the update.
      turn_mask: turns that exist; others are not read and get 0.
      k: strength of the scaling; 0 switches it off exactly.
      k_future: steepness of the bonus.
      zeta: weight of the bonus; 0 switches it off exactly.
      scope: where min, max and the mean of the factor are taken: ``"batch"`` (the paper), ``"group"`` or
        ``"trajectory"``. Centring is always over the batch: inside a trajectory it would erase the outcome.
      group_ids: needed for ``scope="group"``; in [0, N), -1 = absent row. Absent rows are in no scope.
      center: ``"turn"`` subtracts the mean over the batch's turns, each weighing one; ``"token"`` weighs a
        turn by its ``token_counts``; ``"none"`` subtracts nothing.
      token_counts: sampled tokens of each turn, for ``center="token"``.
      active_mask: trajectories that take part; the others (say, of groups with equal returns: `has_spread`)
        count as absent. None = all, as published: then even a zero advantage receives bonus and centring.
      whiten: also divide by the standard deviation over the batch's turns (ddof 1, 1e-8 under the root).
      eps: guards the min-max and the mean.

    Returns:
      Advantages [N, K], 0 off the mask.

    Raises:
      ValueError: for an unknown choice, missing ``group_ids`` or ``token_counts``, or different shapes.
    """
    check_choice("center", center, CENTERS)
    advantages, entropies, mask, ids = _prepare(advantages, turn_entropies, turn_mask, group_ids, scope)
    if active_mask is not None:
        mask = mask & as_mask(active_mask)[:, None]
    factors, normalised = compute_factors(entropies, mask, scope_segments(scope, ids), decay=k, eps=eps)
    certainty = jnp.exp(-jnp.asarray(k_future, advantages.dtype) * normalised)
    bonus = jnp.asarray(zeta, advantages.dtype) * next_valid_values(certainty, mask)
    modulated = advantages * factors + bonus
    result = modulated
    if center == "turn":
        result = modulated - masked_mean(modulated, mask)
    elif center == "token":
        counts = jnp.where(mask, _token_weights(token_counts, advantages, 'center="token"'), 0)
        total = jnp.sum(counts)
        result = modulated - jnp.sum(modulated * counts) / jnp.where(total > 0, total, 1)
    if whiten:
        result = result / jnp.sqrt(masked_spread(modulated, mask)[1] + 1e-8)
    return jnp.where(mask, result, 0)


def aem(
    advantages: Real[Arr, "N K"],
    turn_entropies: Real[Arr, "N K"],
    turn_mask: Shaped[Arr, "N K"],
    *,
    group_ids: Int[Arr, " N"],
    lam: Scalar = 1.0,
    scope: str = "group",
    min_range: Scalar = 0.1,
    mean: str = "turn",
    token_counts: Real[Arr, "N K"] | None = None,
    center: str = "none",
    reverse: bool = False,
    shuffle_key: Key[Array, ""] | UInt32[Array, "2"] | None = None,
    eps: Scalar = 0.0,
) -> Float[Array, "N K"]:
    """Adaptive Entropy Modulation.

        α = exp(−λ Hn) / mean exp(−λ Hn),   A' = α A

    No bonus and no centring: the sign of every advantage is kept. Source: AEM,
    https://arxiv.org/abs/2605.00425.

    When no task has more than one trajectory, a group says nothing beyond its trajectory: scope ``"group"``
    then means ``"batch"``, with a `UserWarning` if the ids are known (not inside ``jit``).

    Args:
      advantages: base advantages of the turns.
      turn_entropies: mean token entropy of the turns, under the policy before the update.
      turn_mask: turns that exist; others are not read and get 0.
      group_ids: the task of each trajectory, in [0, N); -1 = absent row.
      lam: strength λ; 0 switches the modulation off exactly.
      scope: where min, max and mean are taken: ``"group"`` (the paper), ``"batch"`` or ``"trajectory"``.
      min_range: a scope whose entropies span less than this many nats keeps α = 1.
      mean: a turn weighs one in the mean (``"turn"``, the paper) or its ``token_counts`` (``"token"``).
      token_counts: sampled tokens of each turn, for ``mean="token"``.
      center: ``"turn"`` subtracts the mean of A' over the batch's turns afterwards; ``"none"`` (the paper).
      reverse: control: exp(+λ Hn), uncertain turns gain.
      shuffle_key: control: permutes α at random inside its scope.
      eps: guards the min-max and the mean.

    Returns:
      Advantages [N, K], 0 off the mask.

    Raises:
      ValueError: for an unknown choice, missing ``token_counts`` or different shapes.
    """
    check_choice("mean", mean, MEANS)
    check_choice("center", center, ("turn", "none"))
    advantages, entropies, mask, ids = _prepare(advantages, turn_entropies, turn_mask, group_ids, scope)
    segments = aem_segments(scope, ids)
    weights = None if mean == "turn" else _token_weights(token_counts, advantages, 'mean="token"')
    decay = -jnp.asarray(lam, advantages.dtype) if reverse else lam
    factors, _ = compute_factors(
        entropies, mask, segments, decay=decay, eps=eps, min_range=min_range, weights=weights
    )
    if shuffle_key is not None:
        factors = shuffle_in_segments(factors, mask, segments, shuffle_key)
    result = advantages * factors
    if center == "turn":
        result = jnp.where(mask, result - masked_mean(result, mask), 0)
    return result


def aem_segments(scope: str, group_ids: Int[Array, " N"]) -> Int[Array, " N"]:
    """`scope_segments`, except that groups of one trajectory each become one batch (see `aem`)."""
    segments = scope_segments(scope, group_ids)
    if scope != "group":
        return segments
    present = group_ids >= 0
    ones, home = present.astype(jnp.int32), jnp.maximum(group_ids, 0)
    sizes = jax.ops.segment_sum(ones, home, num_segments=group_ids.shape[0])
    alone = (jnp.max(sizes, initial=0) == 1) & (jnp.sum(ones) > 1)
    if not isinstance(alone, jax.core.Tracer) and alone:
        warnings.warn(
            'every task has one trajectory, so AEM\'s scope="group" falls back to scope="batch"', stacklevel=3
        )
    return jnp.where(alone, jnp.where(present, 0, -1), segments)
