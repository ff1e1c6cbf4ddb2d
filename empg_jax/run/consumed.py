"""``consumed.jsonl``: one line for every group that an update trained on, in order.

A resumed run first removes the lines of updates that it repeats, so every group stands there exactly once,
however often the run was killed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from empg_jax.errors import writing
from empg_jax.files import append, write_text_atomic
from empg_jax.types import Trajectory

FILENAME = "consumed.jsonl"


def write_consumed(run_dir: Path, update: int, trajectories: Sequence[Trajectory]) -> None:
    """Append the groups of an update.

    Args:
      run_dir: the run's folder.
      update: number of the update, from 1.
      trajectories: its episodes, sorted by (group, member).

    Raises:
      RunError: the file cannot be written.
    """
    lines = []
    for group_id, group in itertools.groupby(trajectories, key=lambda t: t.group_id):
        members = list(group)
        turns = [turn for trajectory in members for turn in trajectory.turns]
        # A turn's version is its oldest: with rollout.publish=burst its tokens may have newer ones.
        newest = [turn.version if turn.versions is None else int(turn.versions.max()) for turn in turns]
        record = {
            "update": update,
            "group_id": group_id,
            "task": members[0].task,
            "split": members[0].split,
            "members": [trajectory.member for trajectory in members],
            "version_min": min(turn.version for turn in turns),
            "version_max": max(newest),
        }
        lines.append(json.dumps(record) + "\n")
    # One unbuffered write: a kill leaves all of the lines or a part that the next start removes.
    path = Path(run_dir) / FILENAME
    with writing(path), path.open("ab", buffering=0) as file:
        append(file, "".join(lines).encode())


def read_consumed(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the records in order; lines that are not whole are left out."""
    path = Path(run_dir) / FILENAME
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def drop_consumed(run_dir: Path, *, after: int) -> None:
    """Remove the lines of the updates that a run will repeat, and what a kill left half-written."""
    path = Path(run_dir) / FILENAME
    if path.exists():
        kept = [json.dumps(record) for record in read_consumed(run_dir) if record["update"] <= after]
        with writing(path):
            write_text_atomic(path, "".join(line + "\n" for line in kept))
