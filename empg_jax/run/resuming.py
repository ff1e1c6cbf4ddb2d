"""What a run checks before it goes on, and how it goes back to an earlier checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from empg_jax.errors import CheckpointError, ConfigError, writing
from empg_jax.files import read_json_object, write_text_atomic
from empg_jax.metrics import read_metrics
from empg_jax.report.events import EventLog
from empg_jax.report.progress import Progress
from empg_jax.report.record import SUMMARY
from empg_jax.run.checkpoint import Checkpoints
from empg_jax.run.folder import checkpoint_dir
from empg_jax.run.parts import Parts, RunState, has_begun

if TYPE_CHECKING:
    from empg_jax.config import Config


def check_resume(config: Config, run_dir: Path, step: int | None) -> None:
    """Check that a run can go on as it began, before anything is written.

    Raises:
      RefusedCheckpoint: there is no checkpoint of this step.
      CheckpointError: the run has begun, and there is none at all.
      ConfigError: the configuration is not that of the checkpoint, or ends before it.
    """
    from empg_jax.config.load import check_unchanged  # needs pydantic, which a new run does not

    directory, keep = checkpoint_dir(config, run_dir), config.checkpoint.keep
    checkpoints = Checkpoints(directory, keep=keep, warn=lambda line: None)
    if step is not None:
        checkpoints.check_step(step)
        if step > config.train.updates:
            raise ConfigError(f"train.updates={config.train.updates} lies before checkpoint {step}")
    if has_begun(run_dir, checkpoints) and not checkpoints.steps:
        raise CheckpointError(f"no usable checkpoint in {directory} (the folder holds none)")
    progress = checkpoints.read_progress(step)
    if progress is not None and progress.get("config"):
        check_unchanged(progress["config"], config, source=f"{run_dir}/config.yaml")


def keep_evaluation(run_dir: Path, warn: Callable[[str], None]) -> None:
    """Add the evaluation at the end of a finished run to the metrics of its last update.

    A run that goes on from there ends with another one, which takes its place in ``summary.json``.

    Args:
      run_dir: the run's folder.
      warn: told of damaged lines in ``metrics.jsonl``, which are removed.

    Raises:
      RunError: ``metrics.jsonl`` cannot be written.
    """
    path = run_dir / "metrics.jsonl"
    try:
        summary = read_json_object(run_dir / SUMMARY)
        records = read_metrics(path, warn=warn)
    except (OSError, ValueError):  # it did not end, or what it found is lost
        return
    found = {
        name.removesuffix("_after"): value
        for name, value in summary.items()
        if name.startswith("eval_") and name.endswith("_after") and isinstance(value, int | float)
    }
    last = [record for record in records if record["update"] == summary.get("updates")]
    for record in last:
        record |= found
    if found and last:
        with writing(path):
            write_text_atomic(path, "".join(json.dumps(record) + "\n" for record in records))


def go_back(parts: Parts, run: RunState) -> None:
    """Set everything aside that the run made after the checkpoint which it goes on from."""
    moved = parts.checkpoints.set_aside(run.update)
    summary = parts.run_dir / SUMMARY
    if parts.hosts.is_first and summary.exists():  # of a finished run, which is not finished any more
        summary.replace(parts.run_dir / "summary.previous.json")
    parts.events.tell("went_back", step=run.update, set_aside=moved)
    if moved:
        parts.progress.message(f"checkpoints {moved} are set aside, as <step>.aside")


def tell_passed_over(progress: Progress, events: EventLog, line: str) -> None:
    """Report a checkpoint that could not be read, to the user and in the event log."""
    progress.message(line)
    events.tell("checkpoint_skipped", detail=line)
