"""When and what a run saves: the last boundary between two updates, also after a stop or an error."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax

from empg_jax.errors import RunError
from empg_jax.parallel.hosts import END_SECONDS
from empg_jax.run.checkpoint import CheckpointError
from empg_jax.run.parts import Boundary, Parts, RunState
from empg_jax.run.together import gather_cut


def mark_boundary(parts: Parts, run: RunState) -> None:
    """Remember the progress between two updates for the checkpoint of this state."""
    run.boundary = Boundary(
        update=run.update,
        base=parts.base_checksum,
        config=parts.settings,
        recipe=parts.recipe,
        record=copy.deepcopy(run.record),
        seconds=parts.clock.seconds,
    )
    run.marked = int(run.state.step)


def save(parts: Parts, run: RunState) -> None:
    """Write a checkpoint of the last update boundary, unless the newest one on disk is the same."""
    with parts.clock.phase("checkpoint"):
        ledger, trajectories = gather_cut(parts.hosts, lambda: parts.rollout.cut(run.boundary.update))
        boundary = dataclasses.replace(run.boundary, ledger=ledger, trajectories=trajectories)
        progress = boundary.as_json()
        if parts.hosts.first("is-saved", lambda: _same(progress, run.saved)):
            return
        good = good_step(run, parts.checkpoints.steps)
        kept = [step for step in (good, run.record.best_step) if step is not None]
        parts.checkpoints.save(boundary.update, run.state, progress, boundary.trajectories, protect=kept)
        run.saved, run.saved_at = progress, time.monotonic()


def good_step(run: RunState, steps: Sequence[int]) -> int | None:
    """Return the last good checkpoint among those on disk (ascending).

    A checkpoint is good when an update without a fault has followed it. Before that is known of any, the
    oldest one counts as good.
    """
    being_written = [] if run.saved is None else [run.saved["update"]]
    if run.record.last_good in (*steps, *being_written):
        return run.record.last_good
    return steps[0] if steps else None


def is_time_to_save(parts: Parts, run: RunState) -> bool:
    """Return whether the newest checkpoint is older than ``checkpoint.seconds``."""
    limit = parts.config.checkpoint.seconds
    if limit is None:
        return False
    return parts.hosts.any("is-time", time.monotonic() - run.saved_at >= limit)


def save_after_error(parts: Parts, run: RunState, error: BaseException) -> None:
    """Write a checkpoint of the last boundary before an error ends the run, and tell which one is left.

    A failure of this write is told and nothing more: the first error is the one that the user must see.
    """
    kind = type(error).__name__
    try:
        # A disk that has just refused a checkpoint is not asked again.
        is_saved = not isinstance(error, CheckpointError) and is_at_boundary(run)
        # A checkpoint takes all hosts: those that have not failed never come here.
        is_saved = all(parts.hosts.agree("failed", is_saved, seconds=END_SECONDS))
        if is_saved:
            save(parts, run)
        parts.checkpoints.wait()
    except Exception as problem:
        run.saved = None
        is_saved = False
        parts.progress.message(f"no checkpoint could be written after the error: {problem}")
    try:
        steps = parts.checkpoints.steps
    except CheckpointError as problem:  # an object store that does not answer
        steps = []
        parts.progress.message(str(problem))
    with contextlib.suppress(RunError, ValueError):  # a full disk, which may be the first error's cause, too
        parts.events.tell("run_failed", error=kind, checkpoints=steps)
    if is_saved:
        left = f"checkpoint {run.boundary.update} holds the last update"
    else:
        left = f"the newest checkpoint is {steps[-1]}" if steps else "there is no checkpoint yet"
    parts.progress.message(f"{kind}: {left}; go on with: empg-jax train --resume {parts.run_dir}")


def is_at_boundary(run: RunState) -> bool:
    """Return whether the state is that of the last boundary: no optimizer step was made since then."""
    if run.marked is None or any(leaf.is_deleted() for leaf in jax.tree.leaves(run.state)):
        return False  # the update that failed has taken the state's memory
    return int(run.state.step) == run.marked


def _same(progress: dict[str, Any], saved: dict[str, Any] | None) -> bool:
    """Return whether two boundaries are the same; the wall seconds of a process do not count."""
    return saved is not None and {**progress, "seconds": None} == {**saved, "seconds": None}
