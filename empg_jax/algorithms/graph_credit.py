"""Step credit read from the state graph of a task group: CRBC, GraphHCA, GRAFT and GraphGPO.

The first three are readouts of one table of values (`closure_values`): under deterministic moves
``β V(dst) − V(src)`` is ``Q − V``. GraphGPO reads shortest distances. All are constants to the gradient, 0
off the mask, and the same for the same edge.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real, Shaped

from empg_jax.algorithms.advantages import grpo
from empg_jax.algorithms.graph import (
    NOISE,
    StateGraph,
    closure_values,
    edge_means,
    first_of,
    goal_distances,
    iterate,
    make_graph,
    pair_ids,
)
from empg_jax.algorithms.masking import (
    Arr,
    Scalar,
    as_floats,
    as_ids,
    as_mask,
    check_choice,
    check_shapes,
)
from empg_jax.algorithms.segments import (
    center_by_group,
    number_pairs,
    rank_ids,
    segment_means,
    segment_totals,
)

LOG_NOISE = 1e-5  # as NOISE, for logarithms: their rounding is that of the value relative to itself
FAIL_NODES = ("absorbing", "observation")
SETTLED = 1e-8  # a change of summed differences that float32 no longer sees


def _beside_episodes(
    episode: Float[Array, " N"],
    step: Float[Array, " M"],
    turn_mask: Shaped[Arr, "N K"],
    ids: Int[Array, " N"],
) -> Float[Array, "N K"]:
    """Add the credit of trajectories to that of steps."""
    mask = as_mask(turn_mask) & (ids >= 0)[:, None]
    table = step.astype(episode.dtype).reshape(len(mask), -1)[:, : mask.shape[1]]
    return jnp.where(mask, episode[:, None] + table, 0)


def _above_noise(values: Float[Array, " M"], noise: float) -> Float[Array, " M"]:
    return jnp.where(jnp.abs(values) <= noise, 0, values)


def crbc(
    returns: Real[Arr, " N"],
    success: Shaped[Arr, " N"],
    anchor_ids: Int[Arr, "N K"],
    action_ids: Int[Arr, "N K"],
    turn_mask: Shaped[Arr, "N K"],
    group_ids: Int[Arr, " N"],
    *,
    beta: Scalar = 0.98,
    weight: Scalar = 5.0,
    trajectory_weight: Scalar = 1.0,
    min_std: Scalar = 0.1,
    sweeps: int = 700,
    scale_by_std: bool = True,
) -> Float[Array, "N K"]:
    """Compute Cross-Rollout Bellman Credit: an action's exact value less its state's, in the group's own MDP.

        Q(s, a) = β mean_{edges (s, a)} V(dst),   σ(s)² = mean over visits of s of (Q − V)²
        A_it = w_G A^G_i + w_S · 1[s has ≥ 2 actions] (Q − V) / max(σ(s), σ_min)

    A^G is GRPO on the return. A state with one action or one visit has no step credit, nor has a group
    without a success. Source: https://arxiv.org/abs/2609.35082.

    Args:
      returns: episode returns, penalties taken off.
      success: whether the episode reached the goal.
      anchor_ids: observation key of each turn; equal ids = equal observation, -1 = none.
      action_ids: executed action of each turn; equal ids = equal action, -1 = none.
      turn_mask: turns that exist.
      group_ids: the task of each trajectory, in [0, N); -1 = absent.
      beta: β, discount per step.
      weight: w_S, weight of the step part.
      trajectory_weight: w_G, weight of the trajectory part.
      min_std: σ_min, the smallest spread that a state is divided by.
      sweeps: largest number of sweeps of the solver.
      scale_by_std: divide the trajectory part by its group's standard deviation.

    Returns:
      Advantages [N, K], 0 off the mask.

    Raises:
      ValueError: for different shapes.
    """
    check_shapes(anchor_ids=anchor_ids, action_ids=action_ids)
    graph, ids = make_graph(success, anchor_ids, turn_mask, group_ids), as_ids(group_ids)
    values, _ = closure_values(*graph[:3], beta=beta, sweeps=sweeps)
    pairs = pair_ids(graph, action_ids)
    action_values = jnp.asarray(beta, jnp.float32) * segment_means(values[graph.dst], pairs)
    gain = jnp.where(pairs >= 0, action_values - values[graph.src], 0)
    gain = _above_noise(gain, NOISE)
    spread = jnp.sqrt(segment_means(gain**2, graph.src))
    actions = segment_totals(first_of(pairs).astype(jnp.float32), graph.src)
    step = jnp.where(actions >= 2, gain / jnp.maximum(spread, jnp.asarray(min_std, jnp.float32)), 0)
    (returns,) = as_floats(jax.lax.stop_gradient(returns))
    episode = jnp.asarray(trajectory_weight, returns.dtype) * grpo(returns, ids, scale_by_std=scale_by_std)
    return _beside_episodes(episode, jnp.asarray(weight, jnp.float32) * step, turn_mask, ids)


def graph_hca(
    returns: Real[Arr, " N"],
    success: Shaped[Arr, " N"],
    anchor_ids: Int[Arr, "N K"],
    turn_mask: Shaped[Arr, "N K"],
    group_ids: Int[Arr, " N"],
    *,
    gamma: Scalar = 0.95,
    floor: Scalar = 1e-2,
    weight: Scalar = 1.0,
    sweeps: int = 300,
) -> Float[Array, "N K"]:
    """Compute hindsight credit on the graph: the logarithm of how much a move raises the chance of the goal.

        Ψ = log max(Φ, ε),   l_it = Ψ(dst) − Ψ(src),   A_it = A^G_i + w (l_it − mean_s) / std_s

    Φ is `closure_values`; Ψ is 0 at WIN and log ε at LOSE. Mean and standard deviation (ddof 0) are those of
    the moves out of the same state; a single visit gives 0. A^G is GRPO. Source: GraphHCA,
    https://arxiv.org/abs/2609.35084.

    Args:
      returns: episode returns, penalties taken off.
      success: whether the episode reached the goal.
      anchor_ids: observation key of each turn; equal ids = equal observation, -1 = none.
      turn_mask: turns that exist.
      group_ids: the task of each trajectory, in [0, N); -1 = absent.
      gamma: discount per step.
      floor: ε, above 0; smaller chances count as this one.
      weight: w, weight of the step part; 0 is GRPO.
      sweeps: largest number of sweeps of the solver.

    Returns:
      Advantages [N, K], 0 off the mask.

    Raises:
      ValueError: for different shapes.
    """
    graph, ids = make_graph(success, anchor_ids, turn_mask, group_ids), as_ids(group_ids)
    values, _ = closure_values(*graph[:3], beta=gamma, sweeps=sweeps)
    chance = jnp.log(jnp.maximum(values, jnp.asarray(floor, jnp.float32)))
    moved = jnp.where(graph.mask, chance[graph.dst] - chance[graph.src], 0)
    gain, std, count = center_by_group(moved, graph.src, graph.src.size)
    std = std * jnp.sqrt(jnp.maximum(count - 1, 0) / jnp.maximum(count, 1))
    step = jnp.where(std > LOG_NOISE, _above_noise(gain, LOG_NOISE) / jnp.maximum(std, LOG_NOISE), 0)
    episode = grpo(returns, ids)
    return _beside_episodes(episode, jnp.asarray(weight, jnp.float32) * step, turn_mask, ids)


def graph_gae(
    graph: StateGraph, action_ids: Int[Arr, "N K"], *, gamma: Scalar, lam: Scalar, sweeps: int
) -> Float[Array, " M"]:
    """Compute GRAFT's advantages of edges before they are normalized; 0 where there is no edge.

        td = γ V(dst) − V(src),   y(u) = mean over distinct (u, action, dst) of td + γλ y(dst)
        A = td + γλ y(dst)

    ``y`` sums what is reached in one, two, … further moves. Distinct moves count once there: weighted by
    their frequency they cancel at the fixed point of V, whatever λ is.

    Args:
      graph: the edges.
      action_ids: executed action of each turn; -1 = none (moves without one are told apart by their ends).
      gamma: γ.
      lam: λ; 0 leaves td alone.
      sweeps: largest number of sweeps, of either solution.
    """
    values, _ = closure_values(*graph[:3], beta=gamma, sweeps=sweeps)
    gamma, lam = jnp.asarray(gamma, jnp.float32), jnp.asarray(lam, jnp.float32)
    td = jnp.where(graph.mask, gamma * values[graph.dst] - values[graph.src], 0)
    td = _above_noise(td, NOISE)
    size, src, dst = graph.src.size, graph.src, graph.dst
    moves = number_pairs(number_pairs(src, rank_ids(as_ids(action_ids).ravel()) + 1), dst)
    distinct = first_of(moves)

    def sweep(sums: Float[Array, " S"]) -> Float[Array, " S"]:
        return sums.at[:size].set(edge_means(td + gamma * lam * sums[dst], src, distinct))

    sums, _ = iterate(sweep, jnp.zeros(size + 2, jnp.float32), sweeps, SETTLED)
    return jnp.where(graph.mask, _above_noise(td + gamma * lam * sums[dst], NOISE), 0)


def graft(
    success: Shaped[Arr, " N"],
    anchor_ids: Int[Arr, "N K"],
    action_ids: Int[Arr, "N K"],
    turn_mask: Shaped[Arr, "N K"],
    group_ids: Int[Arr, " N"],
    *,
    gamma: Scalar = 0.99,
    lam: Scalar = 0.0,
    eps: Scalar = 1e-6,
    sweeps: int = 1400,
) -> Float[Array, "N K"]:
    """Compute GRAFT: temporal differences on the state graph, normalized among the moves of a state.

        A_it = (A^GAE − mean_s) / (std_s + eps),   std with ddof 0
        at a state that was left once: A^GAE / (|A^GAE| + eps)

    A^GAE is `graph_gae`. There is no trajectory part, so groups of one outcome may carry credit. The paper's
    loss has one ratio per turn (`turn_ratio_clip`). Its sums over hop sets need a table of node pairs; here
    sums over distinct moves take their place, equal to it at one hop. Source: GRAFT (2026).

    Args:
      success: whether the episode reached the goal.
      anchor_ids: observation key of each turn; equal ids = equal observation, -1 = none.
      action_ids: executed action of each turn; -1 = none.
      turn_mask: turns that exist.
      group_ids: the task of each trajectory, in [0, N); -1 = absent.
      gamma: discount per step.
      lam: λ of the sum over the graph.
      eps: added to the standard deviation.
      sweeps: largest number of sweeps of the solver.

    Returns:
      Advantages [N, K], 0 off the mask.

    Raises:
      ValueError: for different shapes.
    """
    check_shapes(anchor_ids=anchor_ids, action_ids=action_ids)
    graph = make_graph(success, anchor_ids, turn_mask, group_ids)
    found = graph_gae(graph, action_ids, gamma=gamma, lam=lam, sweeps=sweeps)
    gain, std, count = center_by_group(found, graph.src, graph.src.size)
    std = std * jnp.sqrt(jnp.maximum(count - 1, 0) / jnp.maximum(count, 1))
    gain, std = jnp.where(count == 1, found, gain), jnp.where(count == 1, jnp.abs(found), std)
    step = _above_noise(gain, NOISE) / (std + jnp.asarray(eps, jnp.float32))
    return jnp.where(graph.mask, step, 0).reshape(turn_mask.shape)


def graph_gpo(
    returns: Real[Arr, " N"],
    success: Shaped[Arr, " N"],
    anchor_ids: Int[Arr, "N K"],
    turn_mask: Shaped[Arr, "N K"],
    group_ids: Int[Arr, " N"],
    *,
    decay: Scalar = 0.1,
    scale: Scalar = 10.0,
    step_weight: Scalar = 1.0,
    episode_weight: Scalar = 1.0,
    eps: Scalar = 1e-6,
    sweeps: int = 64,
    fail_node: str = "absorbing",
    last_anchor_ids: Int[Arr, " N"] | None = None,
) -> Float[Array, "N K"]:
    """Compute GraphGPO: a move is worth more the shorter the way on from where it leads.

        g_it = c w^d(dst),   A_it = w_ep A^G_i + w_step (g_it − mean_s) / (std_s + eps),   std with ddof 1

    d is the number of moves from a node to WIN over all moves of the group, stitched from several
    trajectories; where there is no way, one more than the group's largest. A single visit gives 0. A^G is
    GRPO. A failed episode ends in a node of its own, or in the observation that it saw last: others may have
    gone on from there, so that its last move is worth what theirs is. Source:
    https://arxiv.org/abs/2605.26684, Eq. 4, and verl-agent, https://github.com/langfengQ/verl-agent.

    Args:
      returns: episode returns, penalties taken off.
      success: whether the episode reached the goal.
      anchor_ids: observation key of each turn; equal ids = equal observation, -1 = none.
      turn_mask: turns that exist.
      group_ids: the task of each trajectory, in [0, N); -1 = absent.
      decay: w in (0, 1): worth of a move for each further one that is needed.
      scale: c, against which ``eps`` is small.
      step_weight: w_step.
      episode_weight: w_ep.
      eps: added to the standard deviations.
      sweeps: longest way that is found, in moves.
      fail_node: where a failed episode ends: ``"absorbing"``, a node of its own, or ``"observation"``, the
        one that it saw last (the released recipe).
      last_anchor_ids: key of the observation that each trajectory ended in, -1 = unknown: absorbing;
        ``"observation"`` needs it.

    Returns:
      Advantages [N, K], 0 off the mask.

    Raises:
      ValueError: for different shapes, an unknown choice, or one without its argument.
    """
    check_choice("fail_node", fail_node, FAIL_NODES)
    if fail_node == "observation" and last_anchor_ids is None:
        raise ValueError("fail_node='observation' needs last_anchor_ids")
    ends = last_anchor_ids if fail_node == "observation" else None
    graph, ids = make_graph(success, anchor_ids, turn_mask, group_ids, ends), as_ids(group_ids)
    distances, _ = goal_distances(graph, sweeps=sweeps)
    own = jnp.where(graph.mask, distances[graph.src], 0)
    home = jnp.where(graph.groups >= 0, graph.groups, ids.size)
    reached = jnp.where(jnp.isfinite(own), own, 0)
    farthest = jax.ops.segment_max(reached, home, num_segments=ids.size + 1)
    left = jnp.where(graph.mask, distances[graph.dst], 0)
    left = jnp.where(jnp.isfinite(left), left, farthest[home] + 1)
    # In units of the best move's worth: far from WIN all worths are tiny, but no less exact for that.
    size, weight = graph.src.size, jnp.asarray(decay, jnp.float32)
    states = jnp.where(graph.mask, graph.src, size)
    nearest = jax.ops.segment_min(jnp.where(graph.mask, left, jnp.inf), states, num_segments=size + 1)
    near = jnp.where(graph.mask, nearest[states], 0)
    worth = jnp.asarray(scale, jnp.float32) * weight ** (left - near)
    gain, std, _ = center_by_group(worth, graph.src, size)
    step = gain / (std + jnp.asarray(eps, jnp.float32) / weight**near)
    (returns,) = as_floats(jax.lax.stop_gradient(returns))
    episode = jnp.asarray(episode_weight, returns.dtype) * grpo(returns, ids, eps=eps)
    return _beside_episodes(episode, jnp.asarray(step_weight, jnp.float32) * step, turn_mask, ids)
