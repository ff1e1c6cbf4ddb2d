"""Training episodes on disk: ``rollouts/update-000012.jsonl.gz``, one record of `rollout.record` per line."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from empg_jax.rollout.record import describe_episodes, describe_tokens

if TYPE_CHECKING:
    from empg_jax.learner.passes import Pass
    from empg_jax.types import Trajectory

FOLDER = "rollouts"
_NAME = re.compile(r"update-(\d+)\.jsonl\.gz")


def is_due(update: int, *, every: int, last: int) -> bool:
    """Whether the episodes of an update are written: every so many, the first and the last; 0 is never."""
    return every > 0 and (update % every == 0 or update in (1, last))


def rollouts_path(run_dir: Path, update: int) -> Path:
    """Name the file of an update."""
    return Path(run_dir) / FOLDER / f"update-{update:06d}.jsonl.gz"


def write_update(
    run_dir: Path, update: int, trajectories: Sequence[Trajectory], first: Pass, *, with_tokens: bool
) -> Path:
    """Write the episodes of an update with the credit that was trained on; returns the path.

    Args:
      run_dir: the run's folder.
      update: its number.
      trajectories: in the order of the batch's table.
      first: the first pass over them.
      with_tokens: add the numbers of every token.
    """
    table, tokens = jax.device_get(first.credit.turns), None
    if with_tokens:
        entropies, advantages = jax.device_get((first.scores.entropies, first.credit.advantages))
        tokens = describe_tokens(trajectories, first.host, entropies, advantages)
    return write_rollouts(
        run_dir, update, describe_episodes(trajectories, table, update=update, tokens=tokens)
    )


def write_rollouts(run_dir: Path, update: int, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write the records of an update; readers see the whole file or none. Returns its path."""
    path = rollouts_path(run_dir, update)
    path.parent.mkdir(exist_ok=True)
    write_records(path, records)
    return path


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON lines, compressed if the name ends in ``.gz``, beside their place; then move."""
    text = "".join(format_record(record) + "\n" for record in records).encode()
    # No time and no name inside: equal episodes give equal files.
    content = gzip.compress(text, compresslevel=6, mtime=0) if path.suffix == ".gz" else text
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def format_record(record: Mapping[str, Any]) -> str:
    """One record as one line of JSON."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def drop_rollouts(run_dir: Path, *, after: int) -> None:
    """Remove the files of updates that a resumed run will make again, and those that were cut off."""
    for path in (Path(run_dir) / FOLDER).glob("*"):
        match = _NAME.fullmatch(path.name)
        if (match and int(match[1]) > after) or path.suffix == ".tmp":
            path.unlink()
