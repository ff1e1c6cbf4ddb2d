"""EMPG and AEM: turn advantages reweighted by how certain the policy was.

Both rest on one kernel, `compute_factors`. EMPG adds a bonus for a certain next turn and centers; AEM keeps
the factor alone, with a dead zone.

Everything is a constant to the gradient and must be computed on the whole global batch, before any split.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Real, Shaped, UInt32

from empg_jax.algorithms.kernel import CENTERS as CENTERS
from empg_jax.algorithms.kernel import MEANS as MEANS
from empg_jax.algorithms.kernel import SCOPES as SCOPES
from empg_jax.algorithms.kernel import Modulation as Modulation
from empg_jax.algorithms.kernel import (
    aem_segments,
    compute_factors,
    prepare,
    scope_segments,
    shuffle_in_segments,
    token_weights,
)
from empg_jax.algorithms.masking import (
    Arr,
    Scalar,
    as_mask,
    check_choice,
    masked_mean,
    masked_spread,
    next_valid_values,
)


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
    reverse: bool = False,
    shuffle_key: Key[Array, ""] | UInt32[Array, "2"] | None = None,
    eps: Scalar = 1e-8,
) -> Float[Array, "N K"]:
    """Modulate by EMPG, Entropy-Modulated Policy Gradients.

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
        ``"trajectory"``. Centering is always over the batch: inside a trajectory it would erase the outcome.
      group_ids: needed for ``scope="group"``; in [0, N), -1 = absent row. Absent rows are in no scope.
      center: ``"turn"`` subtracts the mean over the batch's turns, each weighing one; ``"token"`` weighs a
        turn by its ``token_counts``; ``"none"`` subtracts nothing.
      token_counts: sampled tokens of each turn, for ``center="token"``.
      active_mask: trajectories that take part; the others (say, of groups with equal returns: `has_spread`)
        count as absent. None = all, as published: then even a zero advantage receives bonus and centering.
      whiten: also divide by the standard deviation over the batch's turns (ddof 1, 1e-8 under the root).
      reverse: control: exp(+k Hn) and exp(+k' Hn), uncertain turns gain.
      shuffle_key: control: permutes g and f, both alike, at random inside the scope.
      eps: guards the min-max and the mean.

    Returns:
      Advantages [N, K], 0 off the mask.

    Raises:
      ValueError: for an unknown choice, missing ``group_ids`` or ``token_counts``, or different shapes.
    """
    return empg_terms(
        advantages,
        turn_entropies,
        turn_mask,
        k=k,
        k_future=k_future,
        zeta=zeta,
        scope=scope,
        group_ids=group_ids,
        center=center,
        token_counts=token_counts,
        active_mask=active_mask,
        whiten=whiten,
        reverse=reverse,
        shuffle_key=shuffle_key,
        eps=eps,
    ).advantages


def empg_terms(
    advantages: Real[Arr, "N K"],
    turn_entropies: Real[Arr, "N K"],
    turn_mask: Shaped[Arr, "N K"],
    *,
    k: Scalar,
    k_future: Scalar,
    zeta: Scalar,
    scope: str,
    group_ids: Int[Arr, " N"] | None,
    center: str,
    token_counts: Real[Arr, "N K"] | None,
    active_mask: Shaped[Arr, " N"] | None,
    whiten: bool,
    reverse: bool,
    shuffle_key: Key[Array, ""] | UInt32[Array, "2"] | None,
    eps: Scalar,
) -> Modulation:
    """Compute `empg` with the factors and bonuses that it used; arguments as there."""
    check_choice("center", center, CENTERS)
    advantages, entropies, mask, ids = prepare(advantages, turn_entropies, turn_mask, group_ids, scope)
    if active_mask is not None:
        mask = mask & as_mask(active_mask)[:, None]
    segments = scope_segments(scope, ids)
    decay, decay_future = (jnp.asarray(-x if reverse else x, advantages.dtype) for x in (k, k_future))
    factors, normalized = compute_factors(entropies, mask, segments, decay=decay, eps=eps)
    certainty = jnp.exp(-decay_future * normalized)
    if shuffle_key is not None:  # the same key twice: factor and certainty move together
        factors, certainty = (
            shuffle_in_segments(x, mask, segments, shuffle_key) for x in (factors, certainty)
        )
    bonuses = jnp.asarray(zeta, advantages.dtype) * next_valid_values(certainty, mask)
    modulated = advantages * factors + bonuses
    result = modulated
    if center == "turn":
        result = modulated - masked_mean(modulated, mask)
    elif center == "token":
        counts = jnp.where(mask, token_weights(token_counts, advantages, 'center="token"'), 0)
        total = jnp.sum(counts)
        result = modulated - jnp.sum(modulated * counts) / jnp.where(total > 0, total, 1)
    if whiten:
        result = result / jnp.sqrt(masked_spread(modulated, mask)[1] + 1e-8)
    return Modulation(jnp.where(mask, result, 0), factors, jnp.where(mask, bonuses, 0))


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
    """Modulate by AEM, Adaptive Entropy Modulation.

        α = exp(−λ Hn) / mean exp(−λ Hn),   A' = α A

    No bonus and no centering: the sign of every advantage is kept. Source: AEM,
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
    return aem_terms(
        advantages,
        turn_entropies,
        turn_mask,
        group_ids=group_ids,
        lam=lam,
        scope=scope,
        min_range=min_range,
        mean=mean,
        token_counts=token_counts,
        center=center,
        reverse=reverse,
        shuffle_key=shuffle_key,
        eps=eps,
    ).advantages


def aem_terms(
    advantages: Real[Arr, "N K"],
    turn_entropies: Real[Arr, "N K"],
    turn_mask: Shaped[Arr, "N K"],
    *,
    group_ids: Int[Arr, " N"],
    lam: Scalar,
    scope: str,
    min_range: Scalar,
    mean: str,
    token_counts: Real[Arr, "N K"] | None,
    center: str,
    reverse: bool,
    shuffle_key: Key[Array, ""] | UInt32[Array, "2"] | None,
    eps: Scalar,
) -> Modulation:
    """Compute `aem` with the factors that it used; arguments as there."""
    check_choice("mean", mean, MEANS)
    check_choice("center", center, ("turn", "none"))
    advantages, entropies, mask, ids = prepare(advantages, turn_entropies, turn_mask, group_ids, scope)
    segments = aem_segments(scope, ids)
    weights = None if mean == "turn" else token_weights(token_counts, advantages, 'mean="token"')
    decay = -jnp.asarray(lam, advantages.dtype) if reverse else lam
    factors, _ = compute_factors(
        entropies, mask, segments, decay=decay, eps=eps, min_range=min_range, weights=weights
    )
    if shuffle_key is not None:
        factors = shuffle_in_segments(factors, mask, segments, shuffle_key)
    result = advantages * factors
    if center == "turn":
        result = jnp.where(mask, result - masked_mean(result, mask), 0)
    return Modulation(result, factors, jnp.zeros_like(result))
