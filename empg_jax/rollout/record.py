"""The episode record: one JSON object with an episode, its turns, and the credit of each turn.

A run writes records of its training episodes (`empg_jax.run.rollouts`), and ``empg-jax credit`` reads and
writes them. A hand-made turn needs only ``reward``, ``valid``, ``tokens`` and, for a modulation, ``entropy``;
every other field has a default. A record holds no prompts, so `make_trajectory` puts placeholders in their
place. A number that is not known is null there, or absent.
"""

from __future__ import annotations

import collections
import gzip
import itertools
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from empg_jax.rollout.episode import anchor_of
from empg_jax.rollout.record_fields import Record as Record
from empg_jax.rollout.record_fields import RecordError as RecordError
from empg_jax.rollout.record_fields import check_episode
from empg_jax.types import Batch, Outcome, Status, Trajectory, Turn, TurnCredit

CREDIT_FIELDS = ("factor", "bonus", "advantage_base", "advantage")


# ------------------------------------------------------------------------------------------- writing


def describe_episodes(
    trajectories: Sequence[Trajectory],
    credit: TurnCredit | None,
    *,
    update: int,
    tokens: Sequence[Sequence[Record]] | None = None,
) -> list[Record]:
    """Describe the episodes of a batch, with the credit that the learner trained on.

    Args:
      trajectories: episodes in the order of the batch's table.
      credit: the table of turns, on the host; None, where nothing is trained, leaves the credit out and takes
        the sampler's entropies.
      update: the update that trains on them.
      tokens: further fields per trajectory and turn, from `describe_tokens`.

    Returns:
      One record per trajectory.
    """
    return [
        {
            "update": update,
            "group_id": trajectory.group_id,
            "member": trajectory.member,
            "task": trajectory.task,
            "split": trajectory.split,
            **({"group": trajectory.group} if trajectory.group else {}),
            "status": trajectory.outcome.status.value,
            "reason": trajectory.outcome.reason,
            **({"detail": trajectory.outcome.detail} if trajectory.outcome.detail else {}),
            "return": as_number(trajectory.episode_return),
            "success": trajectory.is_success,
            "terminated": trajectory.terminated,
            "truncated": trajectory.truncated,
            "metrics": {name: as_number(value) for name, value in trajectory.metrics.items()},
            **_describe_end(trajectory),
            "turns": [
                _describe_turn(turn)
                | {"entropy": _mean(turn.entropies) if credit is None else as_number(credit.entropies[i, k])}
                | {"logprob": _mean(turn.behavior_logprobs), "anchor": f"{turn.anchor:016x}"}
                | ({} if credit is None else credit_fields(credit, i, k))
                | (tokens[i][k] if tokens is not None else {})
                for k, turn in enumerate(trajectory.turns)
            ],
        }
        for i, trajectory in enumerate(trajectories)
    ]


def describe_tokens(
    trajectories: Sequence[Trajectory], batch: Batch, entropies: np.ndarray, advantages: np.ndarray
) -> list[list[Record]]:
    """List the token arrays of every turn: ids, sampling log-probs, entropies used for credit, advantages.

    Args:
      trajectories: episodes in the order of the batch's table.
      batch: the batch, on the host.
      entropies: float32[B T], the entropies that the credit was computed from, on the host.
      advantages: float32[B T], advantages after modulation, on the host.
    """
    places = np.flatnonzero(batch.loss_mask)
    owners, turns = (np.ravel(ids)[places] for ids in (batch.trajectory_ids, batch.turn_ids))
    # A turn lies in one row, its tokens in order of time: a stable sort keeps that order.
    places = places[np.lexsort((turns, owners))]
    streams = {"token_entropies": np.ravel(entropies), "token_advantages": np.ravel(advantages)}
    found: list[list[Record]] = []
    start = 0
    for trajectory in trajectories:
        found.append([])
        for turn in trajectory.turns:
            stop = start + len(turn.response_tokens)
            fields: Record = {"token_ids": turn.response_tokens.tolist()}
            fields["token_logprobs"] = [as_number(value) for value in turn.behavior_logprobs]
            for name, stream in streams.items():
                fields[name] = [as_number(value) for value in stream[places[start:stop]]]
            found[-1].append(fields)
            start = stop
    return found


def describe_sampled_tokens(trajectories: Sequence[Trajectory]) -> list[list[Record]]:
    """List the token arrays that the sampler recorded: ids, log-probs, entropies."""
    return [
        [
            {
                "token_ids": turn.response_tokens.tolist(),
                "token_logprobs": [as_number(value) for value in turn.behavior_logprobs],
                "token_entropies": [as_number(value) for value in turn.entropies],
            }
            for turn in trajectory.turns
        ]
        for trajectory in trajectories
    ]


def credit_fields(credit: TurnCredit, i: int, k: int) -> Record:
    """Return the credit of turn ``k`` of trajectory ``i`` as record fields; the table is on the host."""
    columns = (credit.factors, credit.bonuses, credit.base, credit.advantages)
    return {name: as_number(column[i, k]) for name, column in zip(CREDIT_FIELDS, columns, strict=True)}


def as_number(value: Any) -> float | None:
    """Convert a number for JSON: the shortest decimal that gives the same float32, null if not finite."""
    with np.errstate(over="ignore"):  # what is too large for float32 is not finite, either
        number = np.float32(value)
    return float(str(number)) if np.isfinite(number) else None


def _describe_end(trajectory: Trajectory) -> Record:
    if trajectory.last_anchor is None:
        return {}
    return {
        "last_observation": trajectory.last_observation,
        "last_anchor": f"{trajectory.last_anchor:016x}",
    }


def _describe_turn(turn: Turn) -> Record:
    return {
        "observation": turn.observation,
        "response": turn.response,
        "reward": as_number(turn.reward),
        "valid": turn.is_valid,
        "finish_reason": turn.finish_reason,
        "version": turn.version,
        "tokens": len(turn.response_tokens),
        **({"action": turn.action} if turn.action is not None else {}),
        **({"milestone": True} if turn.milestone else {}),
        **({} if turn.answer_logprob is None else {"answer_logprob": as_number(turn.answer_logprob)}),
    }


def _mean(values: np.ndarray) -> float | None:
    return as_number(np.mean(values, dtype=np.float64)) if len(values) else None


# ------------------------------------------------------------------------------------------- reading


def read_episodes(path: Path, *, needs_entropy: bool = True) -> list[Record]:
    """Read and check the records of a ``.jsonl`` or ``.jsonl.gz`` file.

    Missing groups and members are filled in: the episodes without a group of one task of a split form a group
    of their own (without a task, all those of the split do), and members without a number take the smallest
    free ones of their group, in the order of the file.

    Args:
      path: the file.
      needs_entropy: refuse turns without an entropy.

    Raises:
      RecordError: the file cannot be read, or a field is missing or of another type.
    """
    found: list[tuple[str, Record]] = []
    for number, line in _read_lines(path):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{where}: not JSON ({error})") from None
        check_episode(record, where, needs_entropy=needs_entropy)
        found.append((where, record))
    if not found:
        raise RecordError(f"{path}: no episodes in it")
    _fill_places(found)
    return [record for _, record in found]


def _fill_places(found: Sequence[tuple[str, Record]]) -> None:
    """Fill in groups and members, so that everything after it may rely on them."""
    records = [record for _, record in found]
    used = {record["group_id"] for record in records if "group_id" in record}
    fresh = 1 + max(max(record.get("group_id", 0), record.get("task", 0)) for record in records)
    groups: dict[tuple[str, int], int] = {}
    for record in records:
        if "group_id" in record:
            continue
        task = record.get("task", 0)
        key = (record.get("split", "train"), task)
        if key not in groups:  # the first split keeps the numbers of its tasks
            groups[key] = fresh if task in used else task
            used.add(groups[key])
            fresh += groups[key] == fresh
        record["group_id"] = groups[key]
    taken: set[tuple[int, int]] = set()
    for where, record in found:
        if "member" in record:
            place = (record["group_id"], record["member"])
            if place in taken:
                raise RecordError(f"{where}: member {place[1]} of group {place[0]} occurs twice")
            taken.add(place)
    free: collections.defaultdict[int, Iterator[int]] = collections.defaultdict(itertools.count)
    for record in records:
        if "member" not in record:
            group = record["group_id"]
            record["member"] = next(number for number in free[group] if (group, number) not in taken)


def make_trajectory(record: Record, *, is_transcript: bool) -> Trajectory:
    """Build the trajectory of a checked record; prompts are placeholders.

    Args:
      record: a record from `read_episodes`.
      is_transcript: each prompt extends the turn before it (``env.context=transcript``), so that the
        episode is one row of tokens; else every turn is a row of its own.
    """
    so_far, turns = np.zeros(1, np.int32), []
    for k, fields in enumerate(record["turns"]):
        turn = _make_turn(fields, prompt=so_far, fallback=f"{record['group_id']} {record['member']} {k}")
        turns.append(turn)
        if is_transcript:
            so_far = np.concatenate([so_far, turn.response_tokens])
    truncated = record.get("truncated", False)
    end = record.get("last_anchor") or record.get("last_observation")
    return Trajectory(
        task=record.get("task", 0),
        split=record.get("split", "train"),
        group_id=record["group_id"],
        member=record["member"],
        turns=tuple(turns),
        outcome=Outcome(
            Status(record.get("status", "trained")), record.get("reason", "ended"), record.get("detail", "")
        ),
        episode_return=float(sum(turn.reward for turn in turns)),
        is_success=record.get("success", False),
        terminated=record.get("terminated", not truncated),
        truncated=truncated,
        metrics=record.get("metrics", {}),
        group=record.get("group", ""),
        last_anchor=anchor_of(end) if end else None,
        last_observation=record.get("last_observation", ""),
    )


def _make_turn(fields: Mapping[str, Any], *, prompt: np.ndarray, fallback: str) -> Turn:
    count = fields["tokens"]
    # Without an observation no two turns are known to share a state, so the turn's own place is its anchor.
    anchor = fields.get("anchor") or fields.get("observation") or fallback
    return Turn(
        prompt_tokens=prompt,
        response_tokens=np.asarray(fields.get("token_ids", [0] * count), np.int32),
        behavior_logprobs=np.asarray(
            fields.get("token_logprobs", [fields.get("logprob", 0.0)] * count), np.float32
        ),
        entropies=np.asarray(
            fields.get("token_entropies", [fields.get("entropy", math.nan)] * count), np.float32
        ),
        reward=float(fields["reward"]),
        version=fields.get("version", 0),
        anchor=anchor_of(anchor),
        is_valid=fields["valid"],
        finish_reason=fields.get("finish_reason", "stop"),
        observation=fields.get("observation", ""),
        response=fields.get("response", ""),
        action=fields.get("action", fields.get("response")),
        milestone=fields.get("milestone", False),
        answer_logprob=fields.get("answer_logprob"),
    )


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and text of every line that is not empty."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise RecordError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read ({error})") from None
