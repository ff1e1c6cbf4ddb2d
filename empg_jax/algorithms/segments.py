"""Statistics over groups of array entries: task groups, packed sequences, turns.

Groups are formed by sorting, or by ids in a known range, and never by pairwise comparison.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real, Shaped

from empg_jax.algorithms.masking import Arr, as_floats, as_ids, as_mask, check_shapes

ROUNDING = 16  # of the last places of a sum, by which orders of its terms and powers of a discount differ


def center_by_group(
    values: Real[Arr, " M"], ids: Int[Array, " M"], num_groups: int
) -> tuple[Float[Array, " M"], Float[Array, " M"], Float[Array, " M"]]:
    """Compute deviations from the group mean, with the group's spread and size.

    Each group is first shifted by its own minimum: a group of equal values gives zeros *exactly*, whatever
    the values (a float mean of equal numbers need not equal them), and large offsets cost no precision.
    Values that differ by rounding alone (`is_rounding`) count as equal: a spread of nothing but rounding must
    not be divided by its own size.

    Args:
      values: one value per member.
      ids: the group of each member in [0, num_groups); -1 = absent.
      num_groups: static bound of the ids.

    Returns:
      ``(deviations, std, count)``, each [M]: deviation from the mean, standard deviation (ddof 1, 0 for a
      group of one) and size of the member's group; 0 for absent members.
    """
    (values,) = as_floats(values)
    valid = ids >= 0
    home = jnp.where(valid, ids, 0)

    def total(x: Float[Array, " M"]) -> Float[Array, " M"]:
        sums = jax.ops.segment_sum(jnp.where(valid, x, 0), home, num_segments=num_groups)
        return jnp.where(valid, sums[home], 0)

    low = jax.ops.segment_min(jnp.where(valid, values, jnp.inf), home, num_segments=num_groups)[home]
    high = jax.ops.segment_max(jnp.where(valid, values, -jnp.inf), home, num_segments=num_groups)[home]
    differ = valid & ~is_rounding(low, high)
    shifted = jnp.where(differ, values, 0) - jnp.where(differ, low, 0)
    count = total(jnp.ones_like(values))
    deviations = jnp.where(valid, shifted - total(shifted) / jnp.maximum(count, 1), 0)
    variance = total(deviations**2) / jnp.maximum(count - 1, 1)
    return deviations, jnp.sqrt(variance), count


def is_rounding(low: Float[Array, "*shape"], high: Float[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """Tell whether two values differ by no more than sums of the same terms in another order do.

    That is `ROUNDING` times the precision of their type, relative to the values where they exceed 1.

    Args:
      low: the smaller value.
      high: the larger one.
    """
    size = jnp.maximum(jnp.maximum(jnp.abs(low), jnp.abs(high)), 1)
    return high - low <= ROUNDING * jnp.finfo(low.dtype).eps * size


def rank_ids(ids: Int[Array, "..."]) -> Int[Array, "..."]:
    """Map arbitrary ids to ids in [0, size): equal stay equal, different stay different, -1 stays -1.

    The new id is the place of the first equal one in sorted order, so one sort does it and no pairwise
    comparison is ever built.

    Args:
      ids: arbitrary int32 of any shape; -1 = absent.
    """
    flat = ids.ravel()
    places = jnp.searchsorted(jnp.sort(flat), flat).astype(jnp.int32)
    return jnp.where(ids >= 0, places.reshape(ids.shape), -1)


def number_pairs(first: Int[Array, "..."], second: Int[Array, "..."]) -> Int[Array, "..."]:
    """Number the distinct pairs in [0, size) by a sort of two keys; -1 where either id is -1.

    Args:
      first: arbitrary int32 of any shape; -1 = absent.
      second: likewise, of the same shape.
    """
    valid = (first >= 0) & (second >= 0)
    places = jnp.arange(first.size, dtype=jnp.int32)
    keys = (jnp.where(valid, first, -1).ravel(), jnp.where(valid, second, -1).ravel(), places)
    one, two, origin = jax.lax.sort(keys, num_keys=2)
    starts = (one != jnp.roll(one, 1)) | (two != jnp.roll(two, 1))
    numbers = jnp.cumsum(starts.astype(jnp.int32).at[0].set(0))
    numbers = jnp.zeros_like(numbers).at[origin].set(numbers)
    return jnp.where(valid, numbers.reshape(first.shape), -1)


def segment_totals(values: Float[Array, "..."], ids: Int[Array, "..."]) -> Float[Array, "..."]:
    """Compute each place's segment sum, in the shape of the input; 0 where the id is -1.

    Args:
      values: any shape.
      ids: same shape, in [0, values.size) or -1 (`rank_ids` gives such).
    """
    valid, home = ids >= 0, jnp.maximum(ids, 0)
    sums = jax.ops.segment_sum(jnp.where(valid, values, 0).ravel(), home.ravel(), num_segments=values.size)
    return jnp.where(valid, sums[home], 0)


def segment_means(values: Float[Array, "..."], ids: Int[Array, "..."]) -> Float[Array, "..."]:
    """Compute each place's segment mean, in the shape of the input; 0 where the id is -1 (see above)."""
    counts = segment_totals(jnp.ones_like(values), ids)
    return segment_totals(values, ids) / jnp.maximum(counts, 1)


def sequence_segments(mask: Bool[Array, "B T"], sequence_ids: Int[Arr, "B T"] | None) -> Int[Array, "B T"]:
    """Number the sequence of each valid token in [0, B·T); -1 elsewhere.

    Args:
      mask: tokens that count.
      sequence_ids: arbitrary ids, -1 = padding; None makes every row a sequence.
    """
    if sequence_ids is None:
        rows = jnp.arange(mask.shape[0], dtype=jnp.int32)[:, None]
        return jnp.where(mask, jnp.broadcast_to(rows, mask.shape), -1)
    check_shapes(mask=mask, sequence_ids=sequence_ids)
    return rank_ids(jnp.where(mask, as_ids(sequence_ids), -1))


def turn_slots(
    loss_mask: Shaped[Arr, "B T"],
    trajectory_ids: Int[Arr, "B T"],
    turn_ids: Int[Arr, "B T"],
    shape: tuple[int, int],
) -> Int[Array, "B T"]:
    """Find the cell ``trajectory * K + turn`` of each token's turn; -1 off the mask or outside the table."""
    num_trajectories, num_turns = shape
    trajectories, turns = as_ids(trajectory_ids), as_ids(turn_ids)
    inside = (trajectories >= 0) & (trajectories < num_trajectories) & (turns >= 0) & (turns < num_turns)
    return jnp.where(as_mask(loss_mask) & inside, trajectories * num_turns + turns, -1)


def count_turn_tokens(
    loss_mask: Shaped[Arr, "B T"],
    trajectory_ids: Int[Arr, "B T"],
    turn_ids: Int[Arr, "B T"],
    *,
    num_trajectories: int,
    num_turns: int,
) -> Int[Array, "N K"]:
    """Count the sampled tokens of each turn (arguments as in `compute_turn_entropies`)."""
    slots = turn_slots(loss_mask, trajectory_ids, turn_ids, (num_trajectories, num_turns)).ravel()
    ones = (slots >= 0).astype(jnp.int32)
    counts = jax.ops.segment_sum(ones, jnp.maximum(slots, 0), num_segments=num_trajectories * num_turns)
    return counts.reshape(num_trajectories, num_turns)


def compute_turn_entropies(
    entropies: Real[Arr, "B T"],
    loss_mask: Shaped[Arr, "B T"],
    trajectory_ids: Int[Arr, "B T"],
    turn_ids: Int[Arr, "B T"],
    *,
    num_trajectories: int,
    num_turns: int,
) -> tuple[Float[Array, "N K"], Bool[Array, "N K"]]:
    """Average each turn's entropies over its sampled tokens: H_it = (1/n_it) Σ_j h_itj.

    It serves any per-token stream that wants a mean over the turn. No gradient flows through it.

    Args:
      entropies: token entropies in nats.
      loss_mask: tokens that the policy sampled; others are not read.
      trajectory_ids: in [0, num_trajectories).
      turn_ids: in [0, num_turns). Tokens outside the table belong to no turn.
      num_trajectories: N, static.
      num_turns: K, static.

    Returns:
      ``(turn_entropies, turn_mask)``: float [N, K], 0 where a turn has no token; bool [N, K], turns that
      have one.
    """
    check_shapes(entropies=entropies, loss_mask=loss_mask, trajectory_ids=trajectory_ids, turn_ids=turn_ids)
    (entropies,) = as_floats(jax.lax.stop_gradient(entropies))
    table = (num_trajectories, num_turns)
    slots = turn_slots(loss_mask, trajectory_ids, turn_ids, table)
    counts = count_turn_tokens(
        loss_mask, trajectory_ids, turn_ids, num_trajectories=num_trajectories, num_turns=num_turns
    )
    kept = jnp.where(slots >= 0, entropies, 0).ravel()
    sums = jax.ops.segment_sum(kept, jnp.maximum(slots, 0).ravel(), num_segments=num_trajectories * num_turns)
    return sums.reshape(table) / jnp.maximum(counts, 1).astype(sums.dtype), counts > 0


def turns_to_tokens(
    values: Real[Arr, "N K"],
    loss_mask: Shaped[Arr, "B T"],
    trajectory_ids: Int[Arr, "B T"],
    turn_ids: Int[Arr, "B T"],
) -> Float[Array, "B T"]:
    """Give every sampled token its turn's value; 0 off the mask. The inverse of `compute_turn_entropies`.

    Args:
      values: one value per turn.
      loss_mask: tokens that the policy sampled.
      trajectory_ids: row of the table for each token.
      turn_ids: column of the table for each token.
    """
    check_shapes(loss_mask=loss_mask, trajectory_ids=trajectory_ids, turn_ids=turn_ids)
    (values,) = as_floats(values)
    slots = turn_slots(loss_mask, trajectory_ids, turn_ids, (values.shape[0], values.shape[1]))
    return jnp.where(slots >= 0, values.ravel()[jnp.maximum(slots, 0)], 0)
