"""What a run checks before it goes on, and how it goes back to an earlier checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from empg_jax.errors import ConfigError
from empg_jax.report.events import EventLog
from empg_jax.report.progress import Progress
from empg_jax.run.checkpoint import Checkpoints
from empg_jax.run.folder import checkpoint_dir
from empg_jax.run.parts import Parts, RunState

if TYPE_CHECKING:
    from empg_jax.config import Config


def check_resume(config: Config, run_dir: Path, step: int | None) -> None:
    """Check that a run can go on as it began, before anything is written.

    Raises:
      RefusedCheckpoint: there is no checkpoint of this step.
      ConfigError: the configuration is not that of the checkpoint, or ends before it.
    """
    from empg_jax.config.load import check_unchanged  # needs pydantic, which a new run does not

    directory, keep = checkpoint_dir(config, run_dir), config.checkpoint.keep
    checkpoints = Checkpoints(directory, keep=keep, warn=lambda line: None)
    if step is not None:
        checkpoints.check_step(step)
        if step > config.train.updates:
            raise ConfigError(f"train.updates={config.train.updates} lies before checkpoint {step}")
    progress = checkpoints.read_progress(step)
    if progress is not None and progress.get("config"):
        check_unchanged(progress["config"], config, source=f"{run_dir}/config.yaml")


def go_back(parts: Parts, run: RunState) -> None:
    """Set everything aside that the run made after the checkpoint which it goes on from."""
    moved = parts.checkpoints.set_aside(run.update)
    summary = parts.run_dir / "summary.json"
    if parts.hosts.is_first and summary.exists():  # of a finished run, which is not finished any more
        summary.replace(parts.run_dir / "summary.previous.json")
    parts.events.tell("went_back", step=run.update, set_aside=moved)
    if moved:
        parts.progress.message(f"checkpoints {moved} are set aside, as <step>.aside")


def tell_passed_over(progress: Progress, events: EventLog, line: str) -> None:
    """Report a checkpoint that could not be read, to the user and in the event log."""
    progress.message(line)
    events.tell("checkpoint_skipped", detail=line)
