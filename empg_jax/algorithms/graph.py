"""The state graph of a task group, and its values: the one solver behind the graph methods.

Per task group a node is an observation (an anchor), and a turn is the edge from the observation that it
answers to the one that its trajectory sees next. The last turn of a trajectory leads to WIN or to LOSE, or,
where it is asked for, that of a failure to the observation that it ended in. Nodes are numbered in [0, N·K),
WIN is N·K and LOSE is N·K + 1 for all groups. A turn without an anchor has no edge, nor has the move into it.

Nothing is pairwise: edges are one flat array, and a sweep over them is a segment sum, minimum or mean.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from empg_jax.algorithms.anchors import anchor_groups
from empg_jax.algorithms.masking import Arr, Scalar, as_ids, as_mask, check_shapes, next_valid_places
from empg_jax.algorithms.segments import number_pairs

NOISE = 1e-6  # a difference of values below it is rounding: not to be divided by its own size


class StateGraph(NamedTuple):
    """The edges of all task groups, one for each turn of the table ``[M = N·K]``.

    Attributes:
      src: the node that the turn starts from; -1 where there is no edge.
      dst: the node that it leads to: a node, WIN (M) or LOSE (M + 1); -1 where there is no edge.
      mask: turns that are edges.
      groups: the task group of each turn; -1 = absent.
    """

    src: Int[Array, " M"]
    dst: Int[Array, " M"]
    mask: Bool[Array, " M"]
    groups: Int[Array, " M"]


def make_graph(
    success: Shaped[Arr, " N"],
    anchor_ids: Int[Arr, "N K"],
    turn_mask: Shaped[Arr, "N K"],
    group_ids: Int[Arr, " N"],
    last_anchor_ids: Int[Arr, " N"] | None = None,
) -> StateGraph:
    """Make the state graph.

    Args:
      success: whether the trajectory reached the goal.
      anchor_ids: arbitrary ids, equal ids = equal observation; -1 = none.
      turn_mask: turns that exist.
      group_ids: in [0, N), -1 = absent.
      last_anchor_ids: the observation that a trajectory ended in: a failure leads there; where it is -1, and
        without this argument, to LOSE. The table then has one more column, in which no turn is an edge.

    Raises:
      ValueError: for different shapes.
    """
    check_shapes(anchor_ids=anchor_ids, turn_mask=turn_mask)
    check_shapes(success=success, group_ids=group_ids)
    ids, anchors = as_ids(group_ids), as_ids(anchor_ids)
    is_turn = present = as_mask(turn_mask) & (ids >= 0)[:, None]
    if last_anchor_ids is not None:
        check_shapes(last_anchor_ids=last_anchor_ids, group_ids=group_ids)
        last = as_ids(last_anchor_ids)[:, None]
        has_node = (last >= 0) & ~as_mask(success)[:, None] & (ids >= 0)[:, None]
        anchors = jnp.concatenate([anchors, last], axis=1)
        present = jnp.concatenate([present, has_node], axis=1)
        is_turn = jnp.concatenate([is_turn, jnp.zeros_like(has_node)], axis=1)
    nodes = anchor_groups(anchors, present, ids)
    size, length = nodes.size, nodes.shape[1]
    after = next_valid_places(present)
    following = jnp.take_along_axis(nodes, jnp.minimum(after, length - 1), axis=1)
    end = jnp.where(as_mask(success), size, size + 1).astype(jnp.int32)[:, None]
    dst = jnp.where(after < length, following, end)
    mask = is_turn & (nodes >= 0) & (dst >= 0)
    groups = jnp.where(present, ids[:, None], -1)
    src, dst = (jnp.where(mask, ids, -1).ravel() for ids in (nodes, dst))
    return StateGraph(src, dst, mask.ravel(), groups.ravel())


def pair_ids(graph: StateGraph, action_ids: Int[Arr, "N K"]) -> Int[Array, " M"]:
    """Number the pairs (node, action) of the edges; -1 where a turn is no edge or has no action."""
    return number_pairs(graph.src, as_ids(action_ids).ravel())


def first_of(ids: Int[Array, " M"]) -> Bool[Array, " M"]:
    """Mark the first place of every id; no place of id -1.

    Args:
      ids: in [0, M), -1 = absent.
    """
    places = jnp.arange(ids.size, dtype=jnp.int32)
    home = jnp.where(ids >= 0, ids, ids.size)
    first = jax.ops.segment_min(places, home, num_segments=ids.size + 1)
    return (ids >= 0) & (first[home] == places)


def iterate(
    sweep: Callable[[Float[Array, " S"]], Float[Array, " S"]],
    start: Float[Array, " S"],
    sweeps: int,
    tolerance: float = 0.0,
) -> tuple[Float[Array, " S"], Float[Array, ""]]:
    """Apply a sweep until nothing changes, at most ``sweeps`` times; return the table and its last change.

    A table that no longer changes is what all further sweeps would give, so an early end costs nothing.

    Args:
      sweep: one sweep over the edges.
      start: the table before the first sweep.
      sweeps: largest number of sweeps, static.
      tolerance: a change that counts as none.
    """

    def goes_on(carry: tuple[Int[Array, ""], Float[Array, " S"], Float[Array, ""]]) -> Bool[Array, ""]:
        return (carry[0] < sweeps) & (carry[2] > tolerance)

    def step(
        carry: tuple[Int[Array, ""], Float[Array, " S"], Float[Array, ""]],
    ) -> tuple[Int[Array, ""], Float[Array, " S"], Float[Array, ""]]:
        count, before, _ = carry
        after = sweep(before)
        change = jnp.where(after == before, 0, jnp.abs(after - before))  # infinity may stay infinity
        return count + 1, after, jnp.max(change, initial=0)

    unknown = jnp.asarray(jnp.inf, start.dtype)
    _, table, residual = jax.lax.while_loop(goes_on, step, (jnp.zeros((), jnp.int32), start, unknown))
    return table, residual


def edge_means(
    values: Float[Array, " M"], src: Int[Array, " M"], mask: Bool[Array, " M"]
) -> Float[Array, " M"]:
    """Average over the edges that leave each node; 0 for a node without one.

    Args:
      values: one value for each edge.
      src: the node that it leaves.
      mask: edges that count.
    """
    size = src.size
    home = jnp.where(mask, src, size)
    sums = jax.ops.segment_sum(jnp.where(mask, values, 0), home, num_segments=size + 1)[:size]
    count = jax.ops.segment_sum(jnp.where(mask, jnp.ones_like(values), 0), home, num_segments=size + 1)
    return sums / jnp.maximum(count[:size], 1)


def closure_values(
    src: Int[Arr, " M"], dst: Int[Arr, " M"], mask: Shaped[Arr, " M"], *, beta: Scalar, sweeps: int
) -> tuple[Float[Array, " S"], Float[Array, ""]]:
    """Solve for the value of every node under the group's own behavior.

        V(WIN) = 1,  V(LOSE) = 0,  V(s) = β · mean over the edges out of s of V(dst)

    Values grow from 0 sweep by sweep, so they end at the fixed point, cycles included; the error after n
    sweeps is at most βⁿ. Source: CRBC, https://arxiv.org/abs/2609.35082, Proposition 1; GraphHCA,
    https://arxiv.org/abs/2609.35084, Proposition 4.2.

    Args:
      src: nodes that edges start from, in [0, M).
      dst: nodes that they lead to, in [0, M + 2): M is WIN, M + 1 is LOSE.
      mask: edges that exist.
      beta: β in [0, 1].
      sweeps: largest number of sweeps.

    Returns:
      ``(values, residual)``: [M + 2], and the largest change of the last sweep.
    """
    size, mask = src.size, as_mask(mask)
    home, away = jnp.where(mask, as_ids(src), size), jnp.where(mask, as_ids(dst), size + 1)
    ones = jax.ops.segment_sum(mask.astype(jnp.float32), home, num_segments=size + 1)[:size]
    scale = jnp.asarray(beta, jnp.float32) / jnp.maximum(ones, 1)

    def sweep(values: Float[Array, " S"]) -> Float[Array, " S"]:
        sums = jax.ops.segment_sum(values[away], home, num_segments=size + 1)[:size]
        return values.at[:size].set(scale * sums)

    return iterate(sweep, jnp.zeros(size + 2, jnp.float32).at[size].set(1), sweeps)


def goal_distances(graph: StateGraph, *, sweeps: int) -> tuple[Float[Array, " S"], Float[Array, ""]]:
    """Count the fewest edges from every node to WIN; infinity where there is no way.

    Args:
      graph: the edges.
      sweeps: largest number of sweeps; paths longer than that are not found.

    Returns:
      ``(distances, residual)``: [M + 2]; the residual is 0 where all are found.
    """
    size = graph.src.size
    home, away = jnp.where(graph.mask, graph.src, size), jnp.where(graph.mask, graph.dst, size + 1)

    def sweep(distances: Float[Array, " S"]) -> Float[Array, " S"]:
        near = 1 + jax.ops.segment_min(distances[away], home, num_segments=size + 1)[:size]
        return distances.at[:size].min(near)

    return iterate(sweep, jnp.full(size + 2, jnp.inf, jnp.float32).at[size].set(0), sweeps)
