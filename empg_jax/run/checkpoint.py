"""Checkpoints (orbax v1): atomic writes, and restoration of the newest complete checkpoint.

A checkpoint holds the train state, the progress (JSON: update, task cursor, phase, counters) and the replay
buffer. Where adapters are trained, the state holds the adapters alone, and the progress holds the checksum of
the base below them. A failed write leaves the earlier checkpoints as they were. Every array has a checksum,
also where it is split over hosts; a damaged checkpoint is skipped with a message.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from empg_jax.errors import CheckpointError, RefusedCheckpoint, first_line
from empg_jax.learner.state import TrainState
from empg_jax.parallel.hosts import ALONE, HostLost, Hosts
from empg_jax.run.checksums import checksums, crc_of, describe_damage, is_split, nonfinite_leaf
from empg_jax.run.step_folders import open_step_folders
from empg_jax.run.storage import pack_trajectories, unpack_trajectories
from empg_jax.types import Params, Trajectory


@dataclasses.dataclass(frozen=True)
class Restored:
    """The content of a checkpoint, and the checksums of its state."""

    step: int
    state: TrainState
    progress: dict[str, Any]
    trajectories: list[Trajectory]
    sums: dict[str, int]


class Checkpoints:
    """The checkpoints of a run: one folder per step, named by its number.

    A step counts only when it is complete. One that exists is written beside the old one, read back, and only
    then swapped with it.

    Args:
      directory: folder of the checkpoints, created when absent, or the URL of an object store.
      keep: number of newest checkpoints to keep.
      warn: receives messages for the user.
      hosts: all write their parts into the same folder; the first one renames and deletes.
    """

    def __init__(
        self, directory: Path | str, *, keep: int, warn: Callable[[str], None], hosts: Hosts = ALONE
    ) -> None:
        self._folders, self._keep, self._warn = open_step_folders(directory), keep, warn
        self.directory = self._folders.directory
        self._hosts = hosts
        self._writing: int | None = None  # step of the newest write, finished or not
        self._pending: tuple[Any, str, Any] | None = None  # orbax's response, the name, the shapes
        self._protected: frozenset[int] = frozenset()

    @property
    def steps(self) -> list[int]:
        """Steps on disk, ascending."""
        return self._folders.steps

    def recover(self) -> None:
        """Finish or undo what a killed process left half done; only the run itself may call this."""
        if self._hosts.is_first:
            self._folders.recover()
        self._hosts.barrier("recovered")

    def save(
        self,
        step: int,
        state: TrainState,
        progress: dict[str, Any],
        trajectories: list[Trajectory],
        *,
        protect: Iterable[int] = (),
    ) -> None:
        """Write a checkpoint in the background; the state may be donated as soon as this returns.

        Args:
          step: number of the checkpoint.
          state: the train state.
          progress: everything else, in JSON types.
          trajectories: content of the replay buffer.
          protect: steps that stay on disk beside the newest ones.

        Raises:
          CheckpointError: the state is not finite, this write could not start, or the one before it failed.
        """
        # One write at a time: a failure of the write before is reported here, under its own step.
        self.wait()
        self._writing, self._protected = step, frozenset(protect)
        bad = next((leaf for leaf in self._hosts.agree("finite", nonfinite_leaf(state)) if leaf), None)
        if bad is not None:
            raise self._failure(ValueError(f"{bad} is not finite"))
        header, arrays = pack_trajectories(trajectories)
        text = json.dumps(progress)
        sums = {"state": checksums(state, self._hosts), "buffer": checksums(arrays)}
        told = {"sums": sums, "text": crc_of(text + header)}
        parts: dict[str, Any] = {
            "state": state,
            "progress": {"json": text, "trajectories": header, "checksums": json.dumps(told)},
        }
        if arrays:
            parts["buffer"] = arrays
        try:
            name = self._hosts.first("is-there", lambda: self._folders.new_name(step))
            self._folders.make()
            response = ocp.save_checkpointables_async(self.directory / name, parts, overwrite=True)
        except HostLost:
            raise
        except Exception as error:
            raise self._failure(error) from error
        self._pending = (response, name, _on_host(state))

    def wait(self) -> None:
        """Return when everything is on disk.

        Raises:
          CheckpointError: the last write failed.
        """
        if self._pending is None:
            return
        (response, name, shapes), self._pending = self._pending, None
        is_second = not name.isdigit()
        try:
            # Orbax keeps a thread and its descriptors until the response is asked for its result.
            response.result()
            if is_second:  # known to be good before the old one goes
                _, problem = self._read_together(self.directory / name, shapes)
                if problem is not None:
                    raise CheckpointError(problem)
            if self._hosts.is_first:
                if is_second:
                    self._folders.swap(name)
                self._evict()
            self._hosts.barrier("written")
        except HostLost:
            raise
        except Exception as error:
            raise self._failure(error) from error

    @property
    def newest(self) -> int:
        """The newest step on disk, readable or not; 0 where there is none."""
        return max(self.steps, default=0)

    def _evict(self) -> None:
        for step in self.steps[: -self._keep]:
            if step not in self._protected:
                self._folders.remove(step)

    def save_reference(self, params: Params) -> None:
        """Write the frozen reference policy, once per run, into the folder of the checkpoints.

        Raises:
          CheckpointError: it could not be written.
        """
        path = self._folders.reference
        try:
            self._hosts.first("reference", self._folders.drop_reference)
            ocp.save(path, params, overwrite=True)
        except HostLost:
            raise
        except Exception as error:
            raise CheckpointError(f"{path} could not be written: {first_line(error)}") from error

    def load_reference(self, shardings: Params, shapes: Params) -> Params:
        """Read the frozen reference policy back onto the mesh.

        Raises:
          CheckpointError: it cannot be read.
        """
        path = self._folders.find_reference()
        try:
            return ocp.load(path, _abstract(shapes, shardings))
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error

    def restore(
        self,
        shardings: TrainState,
        shapes: TrainState,
        *,
        warm_start: tuple[TrainState, TrainState] | None = None,
        step: int | None = None,
    ) -> Restored:
        """Load the newest complete checkpoint (or the one of ``step``) onto the mesh.

        Args:
          shardings: where each leaf of the state goes.
          shapes: shape and type of each leaf.
          warm_start: shardings and shapes of a state that the warm start wrote; None: as the others.
          step: the only step to try; None tries all, newest first.

        Raises:
          CheckpointError: no checkpoint can be read.
        """
        abstract = _abstract(shapes, shardings)
        warm = None if warm_start is None else _abstract(*reversed(warm_start))
        problems = []
        tried = list(reversed(self.steps)) if step is None else [step]
        for candidate in self._hosts.first("steps", lambda: tried):
            found, problem = self._read_together(self._folders.path(candidate), abstract, warm)
            if found is not None:
                return found
            problems.append(f"{candidate}: {problem}")
            self._warn(f"checkpoint {candidate}: {problem} (in {self.directory}); skipped")
        told = "; ".join(problems) or "the folder holds none"
        raise CheckpointError(f"no usable checkpoint in {self.directory} ({told})")

    def read_progress(self, step: int | None = None) -> dict[str, Any] | None:
        """Read the progress of the newest readable checkpoint (or of ``step``) without its arrays."""
        for candidate in reversed(self.steps) if step is None else [step]:
            try:
                return _load_progress(self._folders.path(candidate))
            except Exception as error:  # `restore` tells of it and passes it over
                del error
        return None

    def check_step(self, step: int) -> None:
        """Refuse a step that does not exist.

        Raises:
          RefusedCheckpoint: there is no such step; the message lists those that exist.
        """
        if step not in self.steps:
            there = ", ".join(map(str, self.steps)) or "none"
            raise RefusedCheckpoint(f"{self.directory} has no checkpoint {step}; it has: {there}")

    def set_aside(self, after: int) -> list[int]:
        """Set the checkpoints behind a step aside, as ``<step>.aside``: the run goes on without them."""
        moved = self._hosts.first("behind", lambda: [step for step in self.steps if step > after])
        for step in moved if self._hosts.is_first else []:
            self._folders.set_aside(step)
        return moved

    def _read_together(
        self, path: Any, abstract: Any, warm: Any = None
    ) -> tuple[Restored, None] | tuple[None, str]:
        """Read a step on all hosts (as `_load`): what one cannot read, none has; else tell what is wrong."""
        found, problem = None, None
        try:
            found = self._load(path, abstract, warm)
        except Exception as error:  # a damaged file may raise anything in the reader
            problem = first_line(error)
        problems = filter(None, self._hosts.agree("read", problem))
        # A host that could not read is the cause of those that waited for it in vain.
        problem = min(problems, key=lambda told: "barrier" in told, default=None)
        if problem is None and found is not None:
            problem = self._split_damage(found)
            if problem is None:
                return found, None
        return None, str(problem)

    def _load(self, path: Any, abstract: Any, warm: Any = None) -> Restored:
        """Read and check a step; its state is like ``warm``, if given and if it is of the warm start."""
        if warm is not None and _is_of_warm_start(_load_progress(path)):
            abstract = warm
        wanted: dict[str, Any] = {"state": abstract, "progress": None}
        # An empty buffer has no arrays, and then the checkpoint has no such part.
        if (path / "buffer").exists():
            wanted["buffer"] = None
        parts = ocp.load_checkpointables(path, wanted)
        progress, arrays = parts["progress"], parts.get("buffer") or {}
        told = json.loads(progress.get("checksums", "{}"))  # absent in a checkpoint of an older version
        text = progress["json"] + progress["trajectories"]
        if told.get("text", crc_of(text)) != crc_of(text):
            raise _damaged("the progress")
        sums = told.get("sums", {})  # older versions had sums of another kind
        whole = jax.tree.map(lambda leaf: None if is_split(leaf) else leaf, parts["state"])
        for name, tree in (("state", whole), ("buffer", arrays)):
            if (leaf := describe_damage(tree, sums.get(name, {}))) is not None:
                raise _damaged(f"{name}{leaf}")
        trajectories = unpack_trajectories(progress["trajectories"], arrays)
        return Restored(
            int(path.stem), parts["state"], json.loads(progress["json"]), trajectories, sums.get("state", {})
        )

    def _split_damage(self, found: Restored) -> str | None:
        """Return what is wrong with the arrays that are split over hosts, or None; all hosts have read it."""
        split = jax.tree.map(lambda leaf: leaf if is_split(leaf) else None, found.state)
        leaf = describe_damage(split, found.sums, self._hosts)
        return leaf and first_line(_damaged(f"state{leaf}"))

    def _failure(self, error: Exception) -> CheckpointError:
        try:
            steps = self.steps
        except CheckpointError:  # a store that cannot be written to cannot be listed, either
            steps = []
        kept = f"; usable: {steps}" if steps else ""
        return CheckpointError(
            f"checkpoint {self._writing} could not be written to {self.directory}: {first_line(error)}{kept}"
        )

    def close(self) -> None:
        """Wait for the last write."""
        with contextlib.suppress(HostLost):  # this host fails alone, and its own error is the one to see
            self.wait()


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


def _load_progress(path: Any) -> dict[str, Any]:
    """Read the progress of a step without its arrays."""
    parts = ocp.load_checkpointables(path, {"progress": None})
    return dict(json.loads(parts["progress"]["json"]))


def _is_of_warm_start(progress: dict[str, Any]) -> bool:
    """Return whether a step's state has the optimizer of the warm start, which its first update makes."""
    record = progress.get("record", {})
    return record.get("phase") == "sft" and record.get("sft_update", 0) > 0


def _abstract(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _on_host(tree: Any) -> Any:
    """Describe the tree as arrays in the hosts' memory, each host's with its own part of what is split."""

    def describe(leaf: Any) -> Any:
        if is_split(leaf):
            there = leaf.sharding.with_memory_kind("pinned_host")
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there)
        return np.empty(leaf.shape, leaf.dtype)  # nothing is allocated until it is filled

    return jax.tree.map(describe, tree)


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(f"{what} is damaged: its checksum does not match")
