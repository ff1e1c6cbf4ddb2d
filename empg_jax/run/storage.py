"""Trajectories as plain arrays, without loss: in a checkpoint, and in files of their own."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile

from empg_jax.engine.slots import count_equal
from empg_jax.errors import ConfigError
from empg_jax.files import replacing
from empg_jax.types import Outcome, Status, Trajectory, Turn, share_prompts

ARRAYS = ("prompt_tokens", "response_tokens", "behavior_logprobs", "entropies")
SCALARS = ("reward", "version", "anchor", "is_valid", "finish_reason", "observation", "response")
LATER = ("action", "milestone", "answer_logprob")  # likewise; files of older versions have none
LATER_OF_EPISODES = ("group", "last_anchor", "last_observation", "answer")
FIELDS = ("task", "split", "group_id", "member", "episode_return", "is_success", "terminated", "truncated")


def pack_trajectories(trajectories: Sequence[Trajectory]) -> tuple[str, dict[str, np.ndarray]]:
    """Convert trajectories to a JSON header and flat arrays, without loss.

    A prompt is stored from where it differs from the turn before: whole prompts grow with the square of an
    episode's length.
    """
    header = []
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ARRAYS}
    for trajectory in trajectories:
        turns, before = [], np.zeros(0, np.int32)
        for turn in trajectory.turns:
            repeated = count_equal(before, turn.prompt_tokens)
            arrays = {name: getattr(turn, name) for name in ARRAYS}
            arrays["prompt_tokens"] = turn.prompt_tokens[repeated:]
            for name, array in arrays.items():
                parts[name].append(array)
            turns.append({"repeated": repeated, "lengths": [len(array) for array in arrays.values()]})
            turns[-1] |= {name: getattr(turn, name) for name in (*SCALARS, *LATER)}
            before = np.concatenate([turn.prompt_tokens, turn.response_tokens])
            if turn.versions is not None:
                turns[-1]["versions"] = turn.versions.tolist()
        outcome = trajectory.outcome
        header.append(
            {name: getattr(trajectory, name) for name in FIELDS}
            | {"outcome": [outcome.status.value, outcome.reason, outcome.detail]}
            | {name: getattr(trajectory, name) for name in LATER_OF_EPISODES}
            | {"turns": turns, "metrics": dict(trajectory.metrics)}
        )
    return json.dumps(header), {name: np.concatenate(p) for name, p in parts.items() if p}


def unpack_trajectories(header: str, arrays: dict[str, Any]) -> list[Trajectory]:
    """Rebuild the trajectories from the result of `pack_trajectories`."""
    # The header holds lengths, not offsets: turns are read back in the order in which they were written.
    position = dict.fromkeys(ARRAYS, 0)
    trajectories = []
    for entry in json.loads(header):
        entry |= {"answer": tuple(entry["answer"])} if entry.get("answer") else {}
        turns, before = [], np.zeros(0, np.int32)
        for turn in entry["turns"]:
            values: dict[str, Any] = {}
            for name, length in zip(ARRAYS, turn["lengths"], strict=True):
                start = position[name]
                values[name] = np.asarray(arrays[name])[start : start + length]
                position[name] += length
            # Files of older versions hold whole prompts.
            values["prompt_tokens"] = np.concatenate(
                [before[: turn.get("repeated", 0)], values["prompt_tokens"]]
            )
            before = np.concatenate([values["prompt_tokens"], values["response_tokens"]])
            if "versions" in turn:
                values["versions"] = np.asarray(turn["versions"], np.int32)
            values |= {name: turn[name] for name in LATER if name in turn}
            turns.append(Turn(**values, **{name: turn[name] for name in SCALARS}))
        status, reason, detail = entry["outcome"]
        trajectories.append(
            Trajectory(
                **{name: entry[name] for name in FIELDS},
                **{name: entry[name] for name in LATER_OF_EPISODES if name in entry},
                turns=share_prompts(turns),
                outcome=Outcome(Status(status), reason, detail),
                metrics=entry["metrics"],
            )
        )
    return trajectories


def to_bytes(trajectories: Sequence[Trajectory]) -> bytes:
    """Write trajectories as bytes, for another host; `from_bytes` reads them."""
    header, arrays = pack_trajectories(trajectories)
    file = io.BytesIO()
    np.savez(file, **{"header": np.asarray(header)} | arrays)  # type: ignore[arg-type]
    return zlib.compress(file.getvalue(), level=1)


def from_bytes(content: bytes) -> list[Trajectory]:
    """Rebuild trajectories from `to_bytes`."""
    with np.load(io.BytesIO(zlib.decompress(content)), allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return unpack_trajectories(str(arrays.pop("header")), arrays)


def save_trajectories(path: Path, trajectories: Sequence[Trajectory]) -> None:
    """Write trajectories to an ``.npz`` file, whole or not at all."""
    header, arrays = pack_trajectories(trajectories)
    with replacing(path) as file:
        np.savez_compressed(file, **{"header": np.asarray(header)} | arrays)  # type: ignore[arg-type]


def load_trajectories(path: Path, key: str) -> list[Trajectory]:
    """Read the file that `save_trajectories` wrote.

    Args:
      path: the file.
      key: the configuration key that names it, for messages.

    Raises:
      ConfigError: the file is missing or holds something else.
    """
    try:
        with path.open("rb") as stream, NpzFile(stream) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return unpack_trajectories(str(arrays.pop("header")), arrays)
    except OSError as error:
        raise ConfigError(f"{key}={path} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, zlib.error, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{key}={path} holds no episodes ({error}); 'empg-jax rollout ... --out FILE.npz' writes such"
        ) from None
