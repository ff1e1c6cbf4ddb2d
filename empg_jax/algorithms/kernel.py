"""The kernel of EMPG and AEM: factors from entropies that are normalized inside a scope.

Turn entropies are min-max normalized, mapped through ``exp(−decay · Hn)`` and divided by their mean, so that
the factors have mean 1 in the scope.
"""

import warnings
from typing import NamedTuple

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
)
from empg_jax.algorithms.segments import is_rounding


class Modulation(NamedTuple):
    """The result of a modulation of the turns' advantages.

    Attributes:
      advantages: after modulation and centering.
      factors: multiplicative factors of the base; 1 where nothing is modulated, 0 off the mask.
      bonuses: additive bonuses before centering; 0 without a bonus.
    """

    advantages: Float[Array, "N K"]
    factors: Float[Array, "N K"]
    bonuses: Float[Array, "N K"]


SCOPES = ("batch", "group", "trajectory")
CENTERS = ("turn", "token", "none")
MEANS = ("turn", "token")


def scope_segments(scope: str, group_ids: Int[Array, " N"]) -> Int[Array, " N"]:
    """Number the segment of each trajectory in [0, N): all one, its group, or itself; -1 where absent.

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
    """Compute normalized entropies and self-calibrating factors: the shared kernel.

        Hn = (H − min_s) / (max_s − min_s + eps)
        factor = exp(−decay · Hn) / (mean_s exp(−decay · Hn) + eps)

    Entropies that differ by rounding alone (`is_rounding`) count as equal, Hn = 0: in its last places a mean
    over tokens depends on their number, and that must not be stretched to [0, 1].

    Args:
      turn_entropies: mean token entropy of each turn.
      turn_mask: turns that exist; others are not read.
      segments: the segment s of each trajectory in [0, N); -1 = absent.
      decay: strength; 0 gives factors of exactly 1.
      eps: guards both divisions.
      min_range: segments whose entropies span less than this keep factor 1.
      weights: weight of each turn in the mean; None weighs every turn one.

    Returns:
      ``(factors, normalized)``, each [N, K], 0 off the mask.
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
    span = jnp.where(is_rounding(low, high), 0, high - low)
    scale = jnp.where(span + eps > 0, span + eps, 1)
    normalized = jnp.where(mask & (span > 0), (jnp.where(mask, turn_entropies, low) - low) / scale, 0)

    decayed = jnp.exp(-decay * normalized)
    shares = jnp.where(mask, jnp.ones_like(decayed) if weights is None else weights, 0)
    total = jax.ops.segment_sum(jnp.sum(decayed * shares, axis=1), home, num_segments=num_segments)
    count = jax.ops.segment_sum(jnp.sum(shares, axis=1), home, num_segments=num_segments)
    mean = spread(total / jnp.where(count > 0, count, 1))
    factors = decayed / jnp.where(mean + eps > 0, mean + eps, 1)
    neutral = (span < min_range) | (decay == 0)
    return jnp.where(mask, jnp.where(neutral, 1, factors), 0), normalized


def shuffle_in_segments(
    values: Float[Array, "N K"],
    turn_mask: Bool[Array, "N K"],
    segments: Int[Array, " N"],
    key: Key[Array, ""] | UInt32[Array, "2"],
) -> Float[Array, "N K"]:
    """Permute the valid turns' values at random inside each segment; 0 off the mask.

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


def prepare(
    advantages: Real[Arr, "N K"],
    turn_entropies: Real[Arr, "N K"],
    turn_mask: Shaped[Arr, "N K"],
    group_ids: Int[Arr, " N"] | None,
    scope: str,
) -> tuple[Float[Array, "N K"], Float[Array, "N K"], Bool[Array, "N K"], Int[Array, " N"]]:
    """Check the inputs of a modulation, bring them to one type and drop absent rows from the mask."""
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


def token_weights(
    token_counts: Real[Arr, "N K"] | None, like: Float[Array, "N K"], choice: str
) -> Float[Array, "N K"]:
    """Bring token counts to the type of the computation; ``choice`` names the option that needs them."""
    if token_counts is None:
        raise ValueError(f"{choice} needs token_counts (sampled tokens of each turn, [N, K])")
    check_shapes(advantages=like, token_counts=token_counts)
    return jnp.asarray(token_counts).astype(like.dtype)


def aem_segments(scope: str, group_ids: Int[Array, " N"]) -> Int[Array, " N"]:
    """Number as `scope_segments` does, but make groups of one trajectory each one batch (see `aem`)."""
    segments = scope_segments(scope, group_ids)
    if scope != "group":
        return segments
    present = group_ids >= 0
    ones, home = present.astype(jnp.int32), jnp.maximum(group_ids, 0)
    sizes = jax.ops.segment_sum(ones, home, num_segments=group_ids.shape[0])
    alone = (jnp.max(sizes, initial=0) == 1) & (jnp.sum(ones) > 1)
    if not isinstance(alone, jax.core.Tracer) and alone:
        warnings.warn(
            'every task has one trajectory, so AEM\'s scope="group" falls back to scope="batch"', stacklevel=4
        )
    return jnp.where(alone, jnp.where(present, 0, -1), segments)
