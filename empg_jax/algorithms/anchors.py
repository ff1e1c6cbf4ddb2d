"""GiGPO: episode-level plus step-level groups, the latter made of equal (or similar) observations."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Real, Shaped

from empg_jax.algorithms.advantages import SINGLETONS, grpo, grpo_turn_rows
from empg_jax.algorithms.masking import Arr, Scalar, as_floats, as_ids, as_mask, check_choice, check_shapes
from empg_jax.algorithms.segments import center_by_group, number_pairs
from empg_jax.types import Trajectory

STATISTICS = ("trajectories", "step_rows")


def anchor_groups(
    anchor_ids: Int[Array, "N K"], turn_mask: Bool[Array, "N K"], group_ids: Int[Array, " N"]
) -> Int[Array, "N K"]:
    """Number the pairs (task group, anchor) in [0, N·K) by sorting; -1 where a turn has none.

    Args:
      anchor_ids: arbitrary ids, equal ids = equal observation; -1 = none.
      turn_mask: turns that exist.
      group_ids: in [0, N), -1 = absent.
    """
    groups = jnp.broadcast_to(group_ids[:, None], anchor_ids.shape)
    return number_pairs(jnp.where(turn_mask, groups, -1), anchor_ids)


def gigpo(
    returns: Real[Arr, " N"],
    turn_returns: Real[Arr, "N K"],
    anchor_ids: Int[Arr, "N K"],
    turn_mask: Shaped[Arr, "N K"],
    group_ids: Int[Arr, " N"],
    *,
    omega: Scalar = 1.0,
    scale_by_std: bool = False,
    eps: Scalar = 1e-6,
    singleton: str = "zero",
    statistics: str = "trajectories",
    turn_scores: Real[Arr, "N K"] | None = None,
) -> Float[Array, "N K"]:
    """Compute group-in-group advantages (GiGPO).

        A_it = A^E_it + ω A^S_it

    A^E is group-relative on the episode return; A^S is group-relative on the turn's discounted return, among
    the turns of the same task group that answer the same observation. An anchor group of one gives A^S = 0.
    Where a turn has a score of its own (the return less the penalty of its action), A^E differs between
    turns.
    Source: GiGPO, https://arxiv.org/abs/2505.10978, Eq. 3 and 5-8; the scores and statistics of turns are
    those of verl-agent, https://github.com/langfengQ/verl-agent.

    Args:
      returns: episode returns.
      turn_returns: discounted reward-to-go of each turn.
      anchor_ids: observation key of each turn; equal ids = equal observation, -1 = none.
      turn_mask: turns that exist.
      group_ids: the task of each trajectory, in [0, N); -1 = absent.
      omega: ω, weight of the step part.
      scale_by_std: divide both parts by their group's standard deviation.
      eps: added to the standard deviations.
      singleton: episode part of a task group of one: ``"zero"`` or the ``"raw"`` return.
      statistics: what enters the mean and standard deviation of the episode part: each of ``"trajectories"``
        once (the paper), or every turn, so that long trajectories weigh more (``"step_rows"``).
      turn_scores: score of each turn for the episode part; None = the return, whatever the turn.

    Returns:
      Advantages [N, K], 0 off the mask.

    Raises:
      ValueError: for an unknown choice or different shapes.
    """
    check_choice("singleton", singleton, SINGLETONS)
    check_choice("statistics", statistics, STATISTICS)
    check_shapes(turn_returns=turn_returns, anchor_ids=anchor_ids, turn_mask=turn_mask)
    returns, turn_returns = as_floats(jax.lax.stop_gradient(returns), jax.lax.stop_gradient(turn_returns))
    ids = as_ids(group_ids)
    mask = as_mask(turn_mask) & (ids >= 0)[:, None]
    options: dict[str, Any] = {"scale_by_std": scale_by_std, "eps": eps, "singleton": singleton}
    if turn_scores is None and statistics == "trajectories":
        episode = grpo(returns, ids, **options)[:, None]
    else:
        scores = jnp.broadcast_to(returns[:, None], mask.shape) if turn_scores is None else turn_scores
        rows = "all" if statistics == "step_rows" else "mean"
        episode = grpo_turn_rows(scores, mask, ids, rows=rows, **options)
    members = anchor_groups(as_ids(anchor_ids), mask, ids).ravel()
    step, std, _ = center_by_group(turn_returns.ravel(), members, members.size)
    if scale_by_std:
        step = step / (std + jnp.asarray(eps, std.dtype))
    step = jnp.asarray(omega, step.dtype) * step.reshape(mask.shape)
    return jnp.where(mask, episode + step, 0)


def similarity_anchors(
    observations: Sequence[Sequence[str]],
    group_ids: Sequence[int],
    *,
    num_turns: int,
    threshold: float = 0.95,
) -> np.ndarray:
    """Number observations that are alike rather than equal (host code, before the batch is built).

    Greedy and in order: an observation joins the first cluster of its task group whose first member it
    matches with a `difflib` ratio of at least ``threshold``, else it opens a cluster.

    Args:
      observations: for each trajectory, the observation that each of its turns answers.
      group_ids: the task of each trajectory; -1 = absent.
      num_turns: K, columns of the result.
      threshold: in (0, 1]; 1 clusters equal observations only.

    Returns:
      int32 [N, K], -1 where there is no turn.

    Raises:
      ValueError: for a threshold out of range or a trajectory with more than ``num_turns`` turns.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must lie in (0, 1]")
    anchors = np.full((len(observations), num_turns), -1, np.int32)
    clusters: dict[int, list[tuple[str, int]]] = {}
    known: dict[tuple[int, str], int] = {}
    count = 0
    for row, (texts, group) in enumerate(zip(observations, group_ids, strict=True)):
        if len(texts) > num_turns:
            raise ValueError(f"trajectory {row} has {len(texts)} turns, more than num_turns={num_turns}")
        for turn, text in enumerate(texts if group >= 0 else ()):
            found = known.get((group, text))
            if found is None:
                firsts = clusters.setdefault(group, [])
                found = next((number for first, number in firsts if _alike(first, text, threshold)), count)
                if found == count:
                    firsts.append((text, count))
                    count += 1
                known[group, text] = found
            anchors[row, turn] = found
    return anchors


def join_alike(trajectories: Sequence[Trajectory], threshold: float) -> list[Trajectory]:
    """Give turns whose observations are alike one anchor (host code, before the batch is built).

    Args:
      trajectories: those of a batch.
      threshold: as in `similarity_anchors`; 1 leaves them as they are.

    Returns:
      The same trajectories with other anchors. A turn without an observation, as records of others may have
      it, keeps to those of its own anchor.
    """
    if threshold == 1:
        return list(trajectories)
    numbers: dict[int, int] = {}
    groups = [numbers.setdefault(trajectory.group_id, len(numbers)) for trajectory in trajectories]
    texts = [[turn.observation for turn in trajectory.turns] for trajectory in trajectories]
    # Last, so that the observations of turns form the clusters that they would form alone.
    texts += [[] if each.last_anchor is None else [each.last_observation] for each in trajectories]
    width = max((len(row) for row in texts), default=0)
    found = similarity_anchors(texts, groups * 2, num_turns=width, threshold=threshold)
    unseen: dict[int, int] = {}

    def choose(text: str, anchor: int, cluster: Any) -> int:
        # Below 0 there is no cluster.
        return int(cluster) if text else -1 - unseen.setdefault(anchor, len(unseen))

    return [
        dataclasses.replace(
            trajectory,
            turns=tuple(
                dataclasses.replace(turn, anchor=choose(turn.observation, turn.anchor, cluster))
                for turn, cluster in zip(trajectory.turns, row, strict=False)
            ),
            last_anchor=None
            if trajectory.last_anchor is None
            else choose(trajectory.last_observation, trajectory.last_anchor, last[0]),
        )
        for trajectory, row, last in zip(
            trajectories, found[: len(groups)], found[len(groups) :], strict=True
        )
    ]


def _alike(first: str, text: str, threshold: float) -> bool:
    """Tell whether the `difflib` ratio reaches the threshold; its two cheap upper bounds go first."""
    if first == text:
        return True
    matcher = difflib.SequenceMatcher(None, text, first)
    bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
    return all(bound() >= threshold for bound in bounds)
