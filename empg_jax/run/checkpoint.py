"""Checkpoints (orbax v1): atomic writes, and restoration of the newest complete checkpoint.

A checkpoint holds the train state, the progress (JSON: update, task cursor, phase, counters) and the replay
buffer. Where adapters are trained, the state holds the adapters alone, and the progress holds the checksum of
the base below them. A failed write leaves the earlier checkpoints as they were. A damaged checkpoint is
skipped with a message.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from empg_jax.errors import RunError
from empg_jax.learner.state import TrainState
from empg_jax.run.storage import pack_trajectories, unpack_trajectories
from empg_jax.types import Params, Trajectory


class CheckpointError(RunError):
    """A checkpoint could not be written or read."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """The content of a checkpoint."""

    step: int
    state: TrainState
    progress: dict[str, Any]
    trajectories: list[Trajectory]


class RefusedCheckpoint(CheckpointError):
    """There is no such run, or its checkpoint does not fit the request; nothing was started."""

    exit_code = 2


class Checkpoints:
    """The checkpoints of a run.

    Args:
      directory: folder of the checkpoints; created when absent.
      keep: number of newest checkpoints to keep.
      warn: receives messages for the user.
    """

    def __init__(self, directory: Path, *, keep: int, warn: Callable[[str], None]) -> None:
        self.directory, self._warn = Path(directory).resolve(), warn
        self._writing: int | None = None  # step of the newest write, finished or not
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def steps(self) -> list[int]:
        """Steps on disk, ascending."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(
        self, step: int, state: TrainState, progress: dict[str, Any], trajectories: list[Trajectory]
    ) -> None:
        """Write a checkpoint in the background; the state may be donated as soon as this returns.

        Raises:
          CheckpointError: this write could not start, or the one before it failed.
        """
        header, arrays = pack_trajectories(trajectories)
        parts: dict[str, Any] = {
            "state": state,
            "progress": {"json": json.dumps(progress), "trajectories": header},
        }
        if arrays:
            parts["buffer"] = arrays
        # One write at a time: a failure of the write before is reported here, under its own step.
        self.wait()
        self._writing = step
        try:
            self._checkpointer.save_checkpointables_async(step, parts, overwrite=True)
        except Exception as error:
            raise self._failure(error) from error

    def save_reference(self, params: Params) -> None:
        """Write the frozen reference policy, once per run, beside the checkpoints.

        Raises:
          CheckpointError: it could not be written.
        """
        try:
            ocp.save(self._reference, params, overwrite=True)
        except Exception as error:
            raise CheckpointError(f"{self._reference} could not be written: {_first_line(error)}") from error

    def load_reference(self, shardings: Params, shapes: Params) -> Params:
        """Read the frozen reference policy back onto the mesh.

        Raises:
          CheckpointError: it cannot be read.
        """
        try:
            return ocp.load(self._reference, _abstract(shapes, shardings))
        except Exception as error:
            raise CheckpointError(f"{self._reference} cannot be read: {_first_line(error)}") from error

    @property
    def _reference(self) -> Path:
        return self.directory.parent / "reference"

    def wait(self) -> None:
        """Return when everything is on disk.

        Raises:
          CheckpointError: the last write failed.
        """
        try:
            self._checkpointer.wait()
        except Exception as error:
            raise self._failure(error) from error

    def restore(self, shardings: TrainState, shapes: TrainState, *, step: int | None = None) -> Restored:
        """Load the newest complete checkpoint (or the one of ``step``) onto the mesh.

        Args:
          shardings: where each leaf of the state goes.
          shapes: shape and type of each leaf.
          step: the only step to try; None tries all, newest first.

        Raises:
          CheckpointError: no checkpoint can be read.
        """
        abstract = _abstract(shapes, shardings)
        problems = []
        for candidate in reversed(self.steps) if step is None else [step]:
            try:
                return self._load(candidate, abstract)
            except Exception as error:  # a damaged file may raise anything in the reader
                problems.append(f"{candidate}: {_first_line(error)}")
                self._warn(f"checkpoint {problems[-1]} (in {self.directory}); skipped")
        found = "; ".join(problems) or "the folder holds none"
        raise CheckpointError(f"no usable checkpoint in {self.directory} ({found})")

    def _load(self, step: int, abstract: TrainState) -> Restored:
        wanted: dict[str, Any] = {"state": abstract, "progress": None}
        # An empty buffer has no arrays, and then the checkpoint has no such part.
        if (self.directory / str(step) / "buffer").exists():
            wanted["buffer"] = None
        parts = self._checkpointer.load_checkpointables(step, wanted)
        progress = parts["progress"]
        trajectories = unpack_trajectories(progress["trajectories"], parts.get("buffer") or {})
        return Restored(step, parts["state"], json.loads(progress["json"]), trajectories)

    def _failure(self, error: Exception) -> CheckpointError:
        kept = f"; usable: {self.steps}" if self.steps else ""
        return CheckpointError(
            f"checkpoint {self._writing} could not be written to {self.directory}: {_first_line(error)}{kept}"
        )

    def close(self) -> None:
        """Wait for the last write and release the directory."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()


def check_base(saved: str | None, found: str | None) -> None:
    """Refuse adapters that were trained on another base.

    Args:
      saved: checksum of the base in the checkpoint; None for a checkpoint of whole parameters.
      found: checksum of the base at hand; None without adapters.

    Raises:
      RefusedCheckpoint: they differ.
    """
    if saved != found:
        raise RefusedCheckpoint(
            f"the checkpoint's adapters belong to the base {saved}, but the model at hand is {found}: "
            "model.path must hold the same weights as when the run began (and model.quantize, "
            "model.param_dtype and seed must be the same)"
        )


def _abstract(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
