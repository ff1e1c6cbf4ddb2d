"""Episodes on disk, one record of `rollout.record` per line.

``rollouts/update-000012.jsonl.gz`` holds the training episodes of an update, ``eval/after.jsonl.gz`` some
held-out ones.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from empg_jax.files import replacing
from empg_jax.parallel.arrays import fetch
from empg_jax.report.view.reading import HELD_OUT, ROLLOUTS
from empg_jax.rollout.record import describe_episodes, describe_sampled_tokens, describe_tokens

if TYPE_CHECKING:
    from empg_jax.learner.passes import Pass
    from empg_jax.run.parts import Parts
    from empg_jax.types import Trajectory

_NAME = re.compile(r"update-(\d+)\.jsonl\.gz")


def write_episodes(parts: Parts, update: int, trajectories: Sequence[Trajectory], first: Pass) -> None:
    """Write the episodes of an update with their credit, where that is due.

    These files are for people: a disk that is full costs them, not the run.
    """
    log, last = parts.config.log, parts.config.train.updates
    if not is_due(update, every=log.rollouts_every, last=last):
        return
    if parts.hosts.num > 1:
        first = dataclasses.replace(first, scores=fetch(first.scores), credit=fetch(first.credit))
    if not parts.hosts.is_first:
        return
    try:
        write_update(parts.run_dir, update, trajectories, first, with_tokens=log.rollouts_tokens)
    except OSError as error:
        parts.progress.message(f"the episodes of update {update} could not be written: {error}")
        parts.events.tell("episodes_not_written", detail=str(error))


def is_due(update: int, *, every: int, last: int) -> bool:
    """Return whether an update's episodes are written: each ``every``-th, the first, the last; 0 is never."""
    return every > 0 and (update % every == 0 or update in (1, last))


def rollouts_path(run_dir: Path, update: int) -> Path:
    """Return the path of an update's file."""
    return Path(run_dir) / ROLLOUTS / f"update-{update:06d}.jsonl.gz"


def write_update(
    run_dir: Path, update: int, trajectories: Sequence[Trajectory], first: Pass, *, with_tokens: bool
) -> Path:
    """Write the episodes of an update with the credit that it trained on; return the path.

    Args:
      run_dir: the run's folder.
      update: number of the update.
      trajectories: episodes in the order of the batch's table.
      first: the first pass over the episodes.
      with_tokens: add the numbers of every token.
    """
    table, tokens = jax.device_get(first.credit.turns), None
    if with_tokens:
        entropies, advantages = jax.device_get((first.scores.entropies, first.credit.advantages))
        tokens = describe_tokens(trajectories, first.host, entropies, advantages)
    return write_rollouts(
        run_dir, update, describe_episodes(trajectories, table, update=update, tokens=tokens)
    )


def write_held_out(parts: Parts, update: int, trajectories: Sequence[Trajectory]) -> None:
    """Write ``log.transcripts`` held-out episodes of the trained policy, with the numbers of their tokens.

    A full disk costs them, not the run.

    Args:
      parts: the run's parts.
      update: number of updates that were made.
      trajectories: the episodes of the last evaluation.
    """
    if parts.config.log.transcripts == 0:
        return
    samples = select_samples(trajectories, parts.config.log.transcripts)
    records = describe_episodes(samples, None, update=update, tokens=describe_sampled_tokens(samples))
    path = parts.run_dir / HELD_OUT
    try:
        path.parent.mkdir(exist_ok=True)
        write_records(path, records)
    except OSError as error:
        parts.progress.message(f"the held-out episodes could not be written: {error}")
        parts.events.tell("episodes_not_written", detail=str(error))


def select_samples(trajectories: Sequence[Trajectory], count: int) -> list[Trajectory]:
    """Select at most ``count`` episodes with turns, in order: half of them solved, if there are enough."""
    seen = [trajectory for trajectory in trajectories if trajectory.turns]
    solved = [index for index, trajectory in enumerate(seen) if trajectory.is_success]
    failed = [index for index, trajectory in enumerate(seen) if not trajectory.is_success]
    share = max(count // 2, count - len(failed))  # when one kind is short, the other fills up
    chosen = [*solved[:share], *failed[: count - len(solved[:share])]]
    return [seen[index] for index in sorted(chosen)]


def write_rollouts(run_dir: Path, update: int, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write the records of an update; readers see the whole file or none. Return its path."""
    path = rollouts_path(run_dir, update)
    path.parent.mkdir(exist_ok=True)
    write_records(path, records)
    return path


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON lines to a temporary file and move it to ``path``; ``.gz`` compresses."""
    text = "".join(format_record(record) + "\n" for record in records).encode()
    # The header gets no time and no name, so that equal episodes give equal files.
    content = gzip.compress(text, compresslevel=6, mtime=0) if path.suffix == ".gz" else text
    with replacing(path) as file:
        file.write(content)


def format_record(record: Mapping[str, Any]) -> str:
    """Format one record as one line of JSON."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def drop_rollouts(run_dir: Path, *, after: int) -> None:
    """Remove the files of updates that a resumed run will repeat, and unfinished temporary files."""
    for path in (Path(run_dir) / ROLLOUTS).glob("*"):
        match = _NAME.fullmatch(path.name)
        if (match and int(match[1]) > after) or path.suffix == ".tmp":
            path.unlink()
