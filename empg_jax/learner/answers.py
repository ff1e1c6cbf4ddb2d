"""The policy's probability of a task's known answer after every prompt of an episode (teacher forcing).

Information-gain credit (IGPO) pays a turn by what it adds to this probability. Each prompt is followed by the
words that lead to an answer in a response, and by the answer, whose tokens alone count. The score program and
the shapes are those of training, so nothing compiles. Each prompt is a sequence of its own, which makes this
as much work as several score passes over the batch; a reference or critic of the run is scored with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from empg_jax.learner.batching import BatchShape, Layout, make_batch
from empg_jax.types import Batch, Trajectory

IMPOSSIBLE = -1e4  # log-prob of a token that cannot be sampled

Score = Callable[[Batch, Layout], np.ndarray]  # log-probs float32[B T] of the tokens of a host batch


def score_answers(
    trajectories: Sequence[Trajectory],
    encode: Callable[[str, str], tuple[list[int], list[int]]],
    shape: BatchShape,
    score: Score,
) -> list[Trajectory]:
    """Return the trajectories with ``answer_logprob`` at each turn whose answer is known and fits into a row.

    Args:
      trajectories: episodes.
      encode: what leads to an answer, and the answer, to tokens of a response.
      shape: the training batches'.
      score: the learner's forward pass.
    """
    answers = {trajectory.answer for trajectory in trajectories}
    tokens = {pair: encode(*pair) if pair else ([], []) for pair in answers}
    places = [(i, t) for i, trajectory in enumerate(trajectories) for t in range(len(trajectory.turns))]
    probes = [
        _append(trajectories[i], t, *tokens[trajectories[i].answer], shape.row_tokens) for i, t in places
    ]
    fitting = [(place, probe) for place, probe in zip(places, probes, strict=True) if probe is not None]
    turns = [list(trajectory.turns) for trajectory in trajectories]
    for start in range(0, len(fitting), shape.trajectories):
        some = fitting[start : start + shape.trajectories]
        values = _score_probes([probe for _, probe in some], shape, score)
        for ((i, t), _), value in zip(some, values.tolist(), strict=True):
            turns[i][t] = dataclasses.replace(turns[i][t], answer_logprob=value)
    return [
        dataclasses.replace(trajectory, turns=tuple(own))
        for trajectory, own in zip(trajectories, turns, strict=True)
    ]


def _append(
    trajectory: Trajectory, turn: int, lead: list[int], answer: list[int], room: int
) -> Trajectory | None:
    """Make an episode of one turn, whose response is the answer; None without one, or without room for it."""
    prompt = np.concatenate([trajectory.turns[turn].prompt_tokens, np.asarray(lead, np.int32)])
    if not answer or len(prompt) + len(answer) > room:
        return None
    nothing = np.zeros(len(answer), np.float32)
    probe = dataclasses.replace(
        trajectory.turns[turn],
        prompt_tokens=prompt.astype(np.int32),
        response_tokens=np.asarray(answer, np.int32),
        behavior_logprobs=nothing,
        entropies=nothing,
    )
    return dataclasses.replace(trajectory, turns=(probe,))


def _score_probes(probes: Sequence[Trajectory], shape: BatchShape, score: Score) -> np.ndarray:
    """Score probes by halves until each batch has the shape of training; return a mean log-prob for each."""
    batch, layout = make_batch(probes, shape, seed=(0,))
    if batch.tokens.shape[0] > shape.micro_rows * shape.micro_batches and len(probes) > 1:
        half = len(probes) // 2
        parts = (_score_probes(part, shape, score) for part in (probes[:half], probes[half:]))
        return np.concatenate(list(parts))
    owners, logprobs = batch.trajectory_ids[batch.loss_mask], score(batch, layout)[batch.loss_mask]
    # A token that a filter excludes has probability 0; a finite number keeps differences finite.
    sums = np.bincount(owners, weights=np.maximum(logprobs, IMPOSSIBLE), minlength=len(probes))
    counts = np.bincount(owners, minlength=len(probes))
    return (sums / counts).astype(np.float32)
