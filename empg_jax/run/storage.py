"""Conversion of trajectories to plain arrays and back, for the replay buffer in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from empg_jax.types import Outcome, Status, Trajectory, Turn

ARRAYS = ("prompt_tokens", "response_tokens", "behavior_logprobs", "entropies")
SCALARS = ("reward", "version", "anchor", "is_valid", "finish_reason", "observation", "response")
FIELDS = ("task", "split", "group_id", "member", "episode_return", "is_success", "terminated", "truncated")


def pack_trajectories(trajectories: Sequence[Trajectory]) -> tuple[str, dict[str, np.ndarray]]:
    """Convert trajectories to a JSON header and flat arrays, without loss."""
    header = []
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ARRAYS}
    for trajectory in trajectories:
        turns = []
        for turn in trajectory.turns:
            lengths = []
            for name in ARRAYS:
                parts[name].append(getattr(turn, name))
                lengths.append(len(getattr(turn, name)))
            turns.append({"lengths": lengths} | {name: getattr(turn, name) for name in SCALARS})
            if turn.versions is not None:
                turns[-1]["versions"] = turn.versions.tolist()
        outcome = trajectory.outcome
        header.append(
            {name: getattr(trajectory, name) for name in FIELDS}
            | {"outcome": [outcome.status.value, outcome.reason, outcome.detail]}
            | {"turns": turns, "metrics": dict(trajectory.metrics)}
        )
    return json.dumps(header), {name: np.concatenate(p) for name, p in parts.items() if p}


def unpack_trajectories(header: str, arrays: dict[str, Any]) -> list[Trajectory]:
    """Rebuild the trajectories from the result of `pack_trajectories`."""
    # The header holds lengths, not offsets: turns are read back in the order in which they were written.
    position = dict.fromkeys(ARRAYS, 0)
    trajectories = []
    for entry in json.loads(header):
        turns = []
        for turn in entry["turns"]:
            values: dict[str, Any] = {}
            for name, length in zip(ARRAYS, turn["lengths"], strict=True):
                start = position[name]
                values[name] = np.asarray(arrays[name])[start : start + length]
                position[name] += length
            if "versions" in turn:
                values["versions"] = np.asarray(turn["versions"], np.int32)
            turns.append(Turn(**values, **{name: turn[name] for name in SCALARS}))
        status, reason, detail = entry["outcome"]
        trajectories.append(
            Trajectory(
                **{name: entry[name] for name in FIELDS},
                turns=tuple(turns),
                outcome=Outcome(Status(status), reason, detail),
                metrics=entry["metrics"],
            )
        )
    return trajectories
