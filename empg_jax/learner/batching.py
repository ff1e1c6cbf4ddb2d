"""Trajectories to a `Batch`: merge turns by prefix proof, deal trajectories to optimizer steps, pack, place.

Trajectories are dealt to mini-batches whole and at random, and each mini-batch packs its own rows. So the
number of optimizer steps does not depend on how well the episodes pack, and no episode spans two steps.

Layout of the row axis. A micro-batch is ``R`` rows, the batch has room for ``M`` micro-batches, and row
``r`` of micro-batch ``m`` stands at index ``r * M + m``: reshaped to ``[R, M, T]``, the axis that is sharded
over devices is a whole micro-batch, and the learner loops over the second axis. Mini-batch ``j`` owns a
contiguous range of micro-batches (`Layout.bounds`). Only the bounds depend on the data, the shapes do not.
The one exception: a batch that needs more rows than ``max_rows`` gets twice the room.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from empg_jax.learner.sharing import Family, find_families, pack_families
from empg_jax.types import Batch, Status, Trajectory, empty_fields


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Static sizes of every batch of a run.

    Attributes:
      trajectories: N.
      turns: K.
      row_tokens: T, tokens per row.
      micro_rows: R, rows per micro-batch.
      max_rows: rows that a batch has room for; one that needs more gets twice the room, and so on.
      num_minibatches: optimizer steps per pass over the batch.
      shares_prefix: whether segments of a mini-batch that begin alike share their beginning.
    """

    trajectories: int
    turns: int
    row_tokens: int
    micro_rows: int
    max_rows: int
    num_minibatches: int
    shares_prefix: bool = False

    @property
    def micro_batches(self) -> int:
        """M: room for ``max_rows`` however they fall into mini-batches."""
        per_minibatch = -(-self.max_rows // self.num_minibatches)
        return -(-per_minibatch // self.micro_rows) * self.num_minibatches


@dataclasses.dataclass(frozen=True)
class Layout:
    """Positions of a batch's rows: ``bounds[j]`` is mini-batch ``j``'s range of micro-batches."""

    bounds: tuple[tuple[int, int], ...]
    num_rows: int
    num_tokens: int  # tokens in the rows, padding excluded
    num_segments: int
    num_shared: int = 0  # tokens that are not in the rows, because another segment's stand for them


@dataclasses.dataclass
class Segment:
    """Consecutive turns of one trajectory whose prompts extend each other exactly."""

    trajectory: int
    tokens: np.ndarray  # int32[L]
    loss_mask: np.ndarray  # bool[L]
    turn_ids: np.ndarray  # int32[L]
    logprobs: np.ndarray  # float32[L]
    entropies: np.ndarray  # float32[L]

    @property
    def beginning(self) -> np.ndarray:
        """The tokens that other segments may share: the first prompt without its last token."""
        sampled = int(self.loss_mask.argmax()) if self.loss_mask.any() else len(self.tokens)
        return self.tokens[: max(sampled - 1, 0)]


def merge_turns(trajectory: Trajectory, index: int) -> list[Segment]:
    """Join the turns of a trajectory into as few segments as the prefix proof allows.

    A turn joins the current segment when its prompt starts with every token of it, prompt and responses
    alike; otherwise a new segment starts. No text is tokenized again and no token is dropped.
    """
    segments: list[Segment] = []
    pieces: list[tuple[np.ndarray, np.ndarray, int, np.ndarray, np.ndarray]] = []
    so_far = np.zeros(0, np.int32)

    def close() -> None:
        if pieces:
            tokens, masks, turns, logprobs, entropies = zip(*pieces, strict=True)
            turn_ids = [np.full(len(t), turn, np.int32) for t, turn in zip(tokens, turns, strict=True)]
            parts = (tokens, masks, turn_ids, logprobs, entropies)
            segments.append(Segment(index, *(np.concatenate(part) for part in parts)))
            pieces.clear()

    for turn_id, turn in enumerate(trajectory.turns):
        prompt = turn.prompt_tokens
        if len(prompt) < len(so_far) or not np.array_equal(prompt[: len(so_far)], so_far):
            close()
            so_far = so_far[:0]
        new = prompt[len(so_far) :]
        zeros = np.zeros(len(new), np.float32)
        pieces.append((new, np.zeros(len(new), bool), turn_id, zeros, zeros))
        count = len(turn.response_tokens)
        pieces.append(
            (turn.response_tokens, np.ones(count, bool), turn_id, turn.behavior_logprobs, turn.entropies)
        )
        so_far = np.concatenate([prompt, turn.response_tokens])
    close()
    return segments


def make_batch(
    trajectories: Sequence[Trajectory], shape: BatchShape, *, seed: tuple[int, ...]
) -> tuple[Batch, Layout]:
    """Build the global batch (NumPy arrays in a `Batch`) and its layout.

    Args:
      trajectories: at most ``shape.trajectories``; discarded ones must not be among them.
      shape: the run's static sizes.
      seed: seed (run seed, update, epoch) of the random split into optimizer steps.

    Returns:
      ``(batch, layout)``. The segments and their ``sequence_ids`` depend on the trajectories alone, the
      split into optimizer steps on the seed.

    Raises:
      ValueError: too many trajectories or turns for ``shape``, or a discarded trajectory.
    """
    if len(trajectories) > shape.trajectories:
        raise ValueError(f"{len(trajectories)} trajectories do not fit a batch of {shape.trajectories}")
    for trajectory in trajectories:
        if not trajectory.outcome.is_trained:
            raise ValueError(f"group {trajectory.group_id} member {trajectory.member} was discarded")
        if len(trajectory.turns) > shape.turns:
            raise ValueError(
                f"a trajectory of {len(trajectory.turns)} turns exceeds env.max_turns={shape.turns}"
            )
    segments = [s for i, trajectory in enumerate(trajectories) for s in merge_turns(trajectory, i)]
    steps = _deal_segments(segments, shape, seed)
    # Doubled, not grown to fit: every new shape compiles again, so there should be few of them.
    while sum(-(-len(rows) // shape.micro_rows) for rows in steps) > shape.micro_batches:
        shape = dataclasses.replace(shape, max_rows=2 * shape.max_rows)
    places, minibatch_ids, bounds = _place_rows([len(rows) for rows in steps], shape)
    fields = empty_fields(token=(shape.micro_rows * shape.micro_batches, shape.row_tokens))
    rows = [row for rows in steps for row in rows]
    for place, row in zip(places, rows, strict=True):
        _fill_row(fields, place, row, segments)
    batch = Batch(minibatch_ids=minibatch_ids, **fields, **_trajectory_table(trajectories, shape))
    num_shared = sum((len(family.items) - 1) * family.length for row in rows for family in row)
    num_tokens = sum(len(segment.tokens) for segment in segments) - num_shared
    return batch, Layout(bounds, len(rows), num_tokens, len(segments), num_shared)


def find_tokens(before: Batch, after: Batch) -> np.ndarray:
    """Find the place of each token of a batch in another layout of the same trajectories.

    Args:
      before: one layout, on the host.
      after: another one.

    Returns:
      int32[B T], for every token of ``after`` its place in ``before``, rows laid end to end; -1 at padding,
      and where a token is in a shared beginning of either layout.
    """
    numbers = before.sequence_ids.ravel()
    # Segments and their numbers are the same in both layouts, so one place of each segment is enough: that of
    # its position 0, which lies outside of it if it continues a trunk.
    begins = np.zeros(int(numbers.max(initial=-1)) + 1, np.int32)
    places = np.flatnonzero(numbers >= 0)
    begins[numbers[places]] = places - before.positions.ravel()[places]
    found = np.full(after.sequence_ids.shape, -1, np.int32)
    kept = after.sequence_ids >= 0
    wanted = after.sequence_ids[kept]
    places = begins[wanted] + after.positions[kept]
    is_own = np.logical_and(places >= 0, numbers[np.maximum(places, 0)] == wanted)
    found[kept] = np.where(is_own, places, -1)
    return found


def _deal_segments(
    segments: Sequence[Segment], shape: BatchShape, seed: tuple[int, ...]
) -> list[list[list[Family]]]:
    """Deal whole trajectories evenly to the optimizer steps and pack each step's segments into rows.

    Returns:
      Segment indices per row per step, by family. Fewer steps than ``num_minibatches`` only where there are
      fewer trajectories.
    """
    lengths = [len(segment.tokens) for segment in segments]
    items_of: dict[int, list[int]] = {}
    for item, segment in enumerate(segments):
        items_of.setdefault(segment.trajectory, []).append(item)
    order = np.random.default_rng(seed).permutation(list(items_of))
    steps = []
    for owners in np.array_split(order, max(1, min(shape.num_minibatches, len(order)))):
        items = [item for owner in owners for item in items_of[int(owner)]]
        families = [Family((item,)) for item in items]
        if shape.shares_prefix:
            found = find_families([segments[item].beginning for item in items])
            families = [Family(tuple(items[i] for i in family.items), family.length) for family in found]
        steps.append(pack_families(families, lengths, shape.row_tokens))
    return [rows for rows in steps if rows]


def _place_rows(
    counts: Sequence[int], shape: BatchShape
) -> tuple[list[int], np.ndarray, tuple[tuple[int, int], ...]]:
    """Place ``counts[j]`` rows for mini-batch ``j``; each mini-batch starts at a fresh micro-batch."""
    micro_batches, micro_rows = shape.micro_batches, shape.micro_rows
    minibatch_ids = np.full(micro_batches * micro_rows, -1, np.int32)
    places: list[int] = []
    bounds = []
    micro = 0
    for j, count in enumerate(counts):
        for i in range(count):
            # Rows fill one micro-batch after the other; row r of micro-batch m stands at r * M + m.
            place = (i % micro_rows) * micro_batches + micro + i // micro_rows
            places.append(place)
            minibatch_ids[place] = j
        stop = micro + -(-count // micro_rows)
        bounds.append((micro, stop))
        micro = stop
    return places, minibatch_ids, tuple(bounds)


def _fill_row(
    fields: dict[str, np.ndarray], place: int, families: list[Family], segments: list[Segment]
) -> None:
    """Write a row: each family's trunk, where it has one, and what its segments have beyond it."""
    row = {name: field[place] for name, field in fields.items()}
    start, number = 0, 0
    for family in families:
        trunk = -1
        if family.length:
            number += 1
            trunk, span = number, slice(start, start + family.length)
            row["tokens"][span] = segments[family.items[0]].tokens[: family.length]
            row["segment_ids"][span] = number
            row["positions"][span] = np.arange(family.length)
            start = span.stop
        for item in family.items:
            segment, number, own = segments[item], number + 1, slice(family.length, None)
            span = slice(start, start + len(segment.tokens) - family.length)
            row["tokens"][span] = segment.tokens[own]
            row["loss_mask"][span] = segment.loss_mask[own]
            row["segment_ids"][span] = number
            row["positions"][span] = np.arange(family.length, len(segment.tokens))
            row["trunk_ids"][span] = trunk
            row["sequence_ids"][span] = item
            row["trajectory_ids"][span] = segment.trajectory
            row["turn_ids"][span] = segment.turn_ids[own]
            row["behavior_logprobs"][span] = segment.logprobs[own]
            row["behavior_entropies"][span] = segment.entropies[own]
            start = span.stop


def _trajectory_table(trajectories: Sequence[Trajectory], shape: BatchShape) -> dict[str, np.ndarray]:
    n, k = shape.trajectories, shape.turns
    table = empty_fields(trajectory=(n,), turn=(n, k))
    groups: dict[int, int] = {}
    anchors: dict[int, int] = {}
    actions: dict[str, int] = {}
    for i, trajectory in enumerate(trajectories):
        table["returns"][i] = trajectory.episode_return
        # Numbered anew from 0: segment sums need small indices, not run-wide group ids and 64-bit hashes.
        table["group_ids"][i] = groups.setdefault(trajectory.group_id, len(groups))
        table["trajectory_mask"][i] = True
        table["success"][i] = trajectory.is_success
        table["truncated"][i] = trajectory.truncated
        table["scored_zero"][i] = trajectory.outcome.status is Status.SCORED_ZERO
        for t, turn in enumerate(trajectory.turns):
            table["turn_rewards"][i, t] = turn.reward
            table["turn_truncated"][i, t] = turn.finish_reason == "length"
            table["turn_valid"][i, t] = turn.is_valid
            table["anchor_ids"][i, t] = anchors.setdefault(turn.anchor, len(anchors))
            if turn.action is not None:
                table["action_ids"][i, t] = actions.setdefault(turn.action, len(actions))
            table["milestones"][i, t] = turn.milestone
            table["versions"][i, t] = turn.version
        table["answer_logprobs"][i, : len(trajectory.turns)] = _answer_logprobs(trajectory)
        if trajectory.last_anchor is not None:
            table["last_anchor_ids"][i] = anchors.setdefault(trajectory.last_anchor, len(anchors))
    return table


def _answer_logprobs(trajectory: Trajectory) -> list[float]:
    """List the answer's log-prob at every turn; where it was not scored, that of the turn before.

    Before the first that was scored, it is that one's, so that no turn gains or loses what nobody knows.
    """
    found = [turn.answer_logprob for turn in trajectory.turns]
    known = next((value for value in found if value is not None), 0.0)
    return [known := known if value is None else value for value in found]
