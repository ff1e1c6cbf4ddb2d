"""The examples of a request as a batch of the learner, and per-token numbers to and from their places in it.

Target ``j`` of a datum is the token after input ``j``. The learner stores what it knows of a token at the
token itself, so a datum becomes the row ``inputs + [last target]``, and target ``j`` stands at ``j + 1``.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from empg_jax.learner.batching import BatchShape, Layout, make_batch
from empg_jax.serve.tinker.codec import Datum
from empg_jax.serve.tinker.objectives import Objective
from empg_jax.serve.wire import ApiError, refuse
from empg_jax.types import Batch, Outcome, Status, Trajectory, Turn

# Every size of a batch is a power of two and not too small: each combination is compiled once.
MIN_ROW, MIN_TRAJECTORIES, MIN_TURNS = 32, 64, 8
_KNOWN_INPUTS = {
    "cross_entropy": ("weights",),
    "policy": ("logprobs", "advantages"),
    "ours": ("logprobs", "turns", "rewards", "group"),
}
_OF_TURNS = ("rewards", "anchors", "actions", "valid", "milestones")  # one number for each turn
_NUMBERS = ("group", "trajectory", "success")  # one integer for each datum
_OPTIONAL = ("entropies", "anchors", "actions", "valid", "milestones", "trajectory", "success")  # of ours


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a batch must keep to.

    Attributes:
      vocab_size: of the model.
      max_tokens: longest datum with its last target.
      micro_tokens: tokens of a forward and backward pass.
      mesh: what a pass is split over: rows over ``data`` and ``fsdp``, the tokens of a row over ``sequence``.
    """

    vocab_size: int
    max_tokens: int
    micro_tokens: int
    mesh: Mesh


@dataclasses.dataclass(frozen=True)
class Rows:
    """Examples placed in rows.

    Attributes:
      batch: on the host.
      layout: its layout.
      micro_rows: rows of a micro-batch.
      lengths: number of targets of each datum.
      spans: the targets that are trained as (datum, first, end), in the order of trajectories and turns.
      groups: the ids of groups that the client gave.
    """

    batch: Batch
    layout: Layout
    micro_rows: int
    lengths: list[int]
    spans: list[tuple[int, int, int]]
    groups: frozenset[int]

    def spread(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Put one number per target of every datum at its place: float32[B, T]."""
        grid = np.zeros(self.batch.tokens.shape, np.float32)
        pieces = [values[datum][start:stop] for datum, start, stop in self.spans]
        grid.ravel()[self._places()] = np.concatenate(pieces)
        return grid

    def gather(self, grid: np.ndarray) -> list[np.ndarray]:
        """Take one number per target of every datum from its place; 0 where none is trained."""
        found = [np.zeros(length, np.float32) for length in self.lengths]
        numbers, begin = grid.ravel()[self._places()], 0
        for datum, start, stop in self.spans:
            found[datum][start:stop] = numbers[begin : begin + stop - start]
            begin += stop - start
        return found

    def _places(self) -> np.ndarray:
        """Return the places of all trained tokens, by trajectory, turn and position."""
        b = self.batch
        found = np.flatnonzero(b.loss_mask)
        keys = (b.positions.ravel()[found], b.turn_ids.ravel()[found], b.trajectory_ids.ravel()[found])
        return found[np.lexsort(keys)]


def make_rows(data: Sequence[Datum], objective: Objective, limits: Limits) -> Rows:
    """Check the examples and place them.

    Raises:
      ApiError: one of them does not fit the loss or the limits; the message names it.
    """
    tokens = [_check_tokens(datum, f"datum {i}", limits) for i, datum in enumerate(data)]
    for i, datum in enumerate(data):
        _check_inputs(datum, objective, f"datum {i}")
    make = _make_episodes if objective.has_credit else _make_pieces
    trajectories, spans = make(data, tokens)
    longest = max(len(row) for row in tokens)
    row_tokens = min(limits.max_tokens, _room(longest, MIN_ROW))
    row_tokens += -row_tokens % limits.mesh.shape["sequence"]
    row_devices = limits.mesh.shape["data"] * limits.mesh.shape["fsdp"]
    shares = max(1, limits.micro_tokens // row_tokens // row_devices)
    shape = BatchShape(
        trajectories=_room(len(trajectories), MIN_TRAJECTORIES),
        turns=_room(max(len(t.turns) for t in trajectories), MIN_TURNS),
        row_tokens=row_tokens,
        micro_rows=shares * row_devices,
        max_rows=1,  # doubled as needed, so that few shapes are compiled
        num_minibatches=1,
    )
    batch, layout = make_batch(trajectories, shape, seed=(0,))
    groups = frozenset(int(t.group_id) for t in trajectories) if objective.has_credit else frozenset()
    lengths = [len(datum.tokens) for datum in data]
    return Rows(batch, layout, shape.micro_rows, lengths, spans, groups)


def _room(count: int, least: int) -> int:
    return max(least, 1 << (count - 1).bit_length())


def _check_tokens(datum: Datum, where: str, limits: Limits) -> np.ndarray:
    """Return inputs and last target as one row."""
    targets = datum.inputs.get("target_tokens")
    if targets is None or not len(datum.tokens):
        raise refuse(
            f"{where}: {'the model input is empty' if targets is not None else 'target_tokens is missing'}"
        )
    if targets.dtype.kind != "i" or targets.shape != datum.tokens.shape:
        raise refuse(
            f"{where}: target_tokens has the shape {list(targets.shape)} and type {targets.dtype}; expected "
            f"one integer for each of the {len(datum.tokens)} input tokens"
        )
    different = np.flatnonzero(targets[:-1] != datum.tokens[1:])
    if len(different):
        place = int(different[0])
        raise refuse(
            f"{where}: target_tokens[{place}]={targets[place]} but the next input is "
            f"{datum.tokens[place + 1]}: targets must be the input shifted by one"
        )
    row = np.append(datum.tokens, targets[-1:]).astype(np.int64)
    wrong = row[(row < 0) | (row >= limits.vocab_size)]
    if len(wrong):
        raise refuse(f"{where}: {wrong[0]} is no token id; they lie in [0, {limits.vocab_size})")
    if len(row) > limits.max_tokens:
        raise refuse(
            f"{where}: {len(row)} tokens (the last target included), but the context has "
            f"{limits.max_tokens} (serve.max_tokens)"
        )
    return row.astype(np.int32)


def _check_inputs(datum: Datum, objective: Objective, where: str) -> None:
    kind = "ours" if objective.has_credit else objective.name
    needed = (*_KNOWN_INPUTS.get(kind, _KNOWN_INPUTS["policy"]), *objective.facts)
    optional = _OPTIONAL if objective.has_credit else ()
    for name in needed:
        if name not in datum.inputs and name != "weights":
            raise refuse(f"{where}: {name} is missing; {objective.name} needs {', '.join(needed)}")
    for name, values in datum.inputs.items():
        if name == "target_tokens":
            continue
        if name not in (*needed, *optional):
            raise refuse(f"{where}: {objective.name} has no input {name}; it has {', '.join(needed)}")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise refuse(f"{where}: {name} holds a number that is not finite")
        if name in ("weights", "logprobs", "advantages", "entropies"):
            _check_shape(values, datum.tokens.shape, name, where)
    if objective.has_credit:
        _check_turns(datum, where)


def _check_shape(values: np.ndarray, shape: tuple[int, ...], name: str, where: str) -> None:
    if values.shape != shape:
        raise refuse(f"{where}: {name} has the shape {list(values.shape)}; expected {list(shape)}")


def _check_turns(datum: Datum, where: str) -> None:
    spans = datum.inputs["turns"]
    if spans.dtype.kind != "i" or spans.ndim != 2 or spans.shape[1] != 2 or not len(spans):
        raise refuse(f"{where}: turns has the shape {list(spans.shape)}; expected integers [turns, 2]")
    edges = spans.reshape(-1)
    if (np.diff(edges) < 0).any() or edges[0] < 0 or edges[-1] > len(datum.tokens):
        raise refuse(
            f"{where}: turns must be spans of targets [start, stop) in order, within [0, {len(datum.tokens)}]"
        )
    if (spans[:, 0] == spans[:, 1]).any():
        raise refuse(f"{where}: turn {int(np.argmax(spans[:, 0] == spans[:, 1]))} is empty")
    for name in _OF_TURNS:
        if name in datum.inputs:
            _check_shape(datum.inputs[name], (len(spans),), name, where)
    for name in _NUMBERS:
        if name in datum.inputs and (datum.inputs[name].size != 1 or datum.inputs[name].dtype.kind != "i"):
            raise refuse(f"{where}: {name} must be one integer")


# ------------------------------------------------------------------------------------ trajectories


def _make_pieces(
    data: Sequence[Datum], tokens: Sequence[np.ndarray]
) -> tuple[list[Trajectory], list[tuple[int, int, int]]]:
    """Make one trajectory of one turn from every datum: all of its targets are scored."""
    trajectories = []
    for i, (datum, row) in enumerate(zip(data, tokens, strict=True)):
        logprobs = datum.inputs.get("logprobs", np.zeros(len(row) - 1))
        turn = _make_turn(row[:1], row[1:], logprobs, np.zeros(len(row) - 1), reward=0.0, anchor=0)
        trajectories.append(_make_trajectory(i, 0, [turn]))
    return trajectories, [(i, 0, len(row) - 1) for i, row in enumerate(tokens)]


def _make_episodes(
    data: Sequence[Datum], tokens: Sequence[np.ndarray]
) -> tuple[list[Trajectory], list[tuple[int, int, int]]]:
    """Make trajectories from turns; datums of the same group and ``trajectory`` are parts of one."""
    parts: dict[tuple[int, Any], list[int]] = {}
    for i, datum in enumerate(data):
        group = int(datum.inputs["group"].item())
        own = datum.inputs.get("trajectory")
        parts.setdefault((group, ("alone", i) if own is None else int(own.item())), []).append(i)
    trajectories, spans, members = [], [], dict.fromkeys((key[0] for key in parts), 0)
    for (group, _), members_of in parts.items():
        turns = []
        for i in members_of:
            for k, (start, stop) in enumerate(data[i].inputs["turns"].tolist()):
                turns.append(_read_turn(data[i], tokens[i], k))
                spans.append((i, start, stop))
        is_success = any(bool(data[i].inputs.get("success", np.zeros(1)).item()) for i in members_of)
        trajectories.append(_make_trajectory(group, members[group], turns, is_success=is_success))
        members[group] += 1
    return trajectories, spans


def _read_turn(datum: Datum, row: np.ndarray, k: int) -> Turn:
    inputs = datum.inputs
    start, stop = inputs["turns"][k].tolist()
    before = int(inputs["turns"][k - 1, 1]) if k else 0
    # What the turn answers: the tokens since the last response.
    seen = zlib.crc32(row[before + 1 if k else 0 : start + 1].tobytes())
    return _make_turn(
        row[: start + 1],
        row[start + 1 : stop + 1],
        inputs["logprobs"][start:stop],
        inputs["entropies"][start:stop] if "entropies" in inputs else np.zeros(stop - start),
        reward=float(inputs["rewards"][k]),
        anchor=int(inputs["anchors"][k]) if "anchors" in inputs else seen,
        # Without their numbers, equal responses are equal actions.
        action=str(inputs["actions"][k] if "actions" in inputs else row[start + 1 : stop + 1].tobytes()),
        is_valid=bool(inputs["valid"][k]) if "valid" in inputs else True,
        milestone=bool(inputs["milestones"][k]) if "milestones" in inputs else False,
    )


def _make_turn(
    prompt: np.ndarray,
    response: np.ndarray,
    logprobs: np.ndarray,
    entropies: np.ndarray,
    *,
    reward: float,
    anchor: int,
    action: str | None = None,
    is_valid: bool = True,
    milestone: bool = False,
) -> Turn:
    return Turn(
        prompt_tokens=prompt,
        response_tokens=response,
        behavior_logprobs=logprobs.astype(np.float32),
        entropies=entropies.astype(np.float32),
        reward=reward,
        version=0,
        anchor=anchor,
        is_valid=is_valid,
        finish_reason="stop",
        action=action,
        milestone=milestone,
    )


def _make_trajectory(group: int, member: int, turns: list[Turn], *, is_success: bool = False) -> Trajectory:
    return Trajectory(
        task=0,
        split="train",
        group_id=group,
        member=member,
        turns=tuple(turns),
        outcome=Outcome(Status.TRAINED, "client"),
        episode_return=sum(turn.reward for turn in turns),
        is_success=is_success,
        terminated=True,
        truncated=False,
    )


def has_entropies(data: Sequence[Datum]) -> bool:
    """Return whether the client sent the sampler's entropies.

    Raises:
      ApiError: some datums have them and some do not.
    """
    having = [i for i, datum in enumerate(data) if "entropies" in datum.inputs]
    if having and len(having) < len(data):
        missing = next(i for i in range(len(data)) if i not in having)
        raise ApiError(400, f"datum {missing}: entropies is missing, but datum {having[0]} has it")
    return bool(having)
