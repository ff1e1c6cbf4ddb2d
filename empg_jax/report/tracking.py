"""Trackers: TensorBoard, Weights & Biases, MLflow, trackio. Each package is imported where it is chosen."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from empg_jax.errors import ConfigError, first_line
from empg_jax.files import write_text_atomic

if TYPE_CHECKING:
    from empg_jax.config import Config

# Files in the run's folder, by which a resumed run goes on with the same: folders may share a name.
MLFLOW_RUN = "mlflow_run_id"
RUN_ID = "tracked_run_id"  # of W&B and trackio
PARAMS_AT_ONCE = 100  # MLflow's limit
PARAM_LENGTH = 500  # characters of a value that every MLflow server takes


class Tracker(Protocol):
    """Somebody who is told a run's metrics."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the metrics of an update."""
        ...

    def finish(self) -> None:
        """End the run."""
        ...


def import_trackers(config: Config) -> dict[str, Any]:
    """Import the packages of the trackers that a configuration switches on, by name.

    Raises:
      ConfigError: one is not installed.
    """
    return {name: _import(name) for name in ("wandb", "mlflow", "trackio") if getattr(config.log, name)}


def open_trackers(config: Config, run_dir: Path, *, resume_at: int | None) -> list[Tracker]:
    """Open the trackers that a configuration switches on, with its keys, name and tags.

    Args:
      config: the run's configuration.
      run_dir: the run's folder, whose name is that of the run.
      resume_at: the first update that will be told again, of a run that was tracked before; None: a new run.

    Raises:
      ConfigError: a package is not installed, or a tracker does not start.
    """
    makers = {"wandb": _open_wandb, "mlflow": _Mlflow, "trackio": _open_trackio}
    opened: list[Tracker] = []
    for name, package in import_trackers(config).items():
        try:
            tracker = makers[name](package, config, run_dir, resume_at is not None)
        except Exception as error:  # of any kind: the packages have no common one
            for other in opened:
                other.finish()
            raise ConfigError(f"log.{name}=true, but {name} does not start: {first_line(error)}") from error
        opened.append(_Guarded(name, tracker))
    if config.log.tensorboard:
        opened.append(_Guarded("tensorboard", _TensorBoard(run_dir / "tensorboard", resume_at)))
    return opened


class _Guarded:
    """A tracker whose failures cost its own record of the run, and nothing else."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name = name
        self._tracker: Tracker | None = tracker

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._try(f"update {step}", lambda tracker: tracker.log(values, step=step))

    def finish(self) -> None:
        self._try("its end", lambda tracker: tracker.finish())

    def _try(self, when: str, call: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            call(self._tracker)
        except Exception as error:
            self._tracker = None  # each of its own attempts may take minutes
            told = f"{self._name} failed at {when} and is told nothing more of this run: {first_line(error)}"
            print(f"warning: {told} (metrics.jsonl has all)", file=sys.stderr)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"log.{name}=true needs {name}; in the clone: pip install -e '.[{name}]'") from None


def _keys(config: Config) -> dict[str, Any]:
    """List the configuration's keys as values that trackers take."""
    return config.model_dump(mode="json")


def _identify(run_dir: Path) -> str:
    """Return the run's own id; the first call draws it, and the folder keeps it."""
    return _own_id(run_dir, RUN_ID) or _keep_id(run_dir, RUN_ID, secrets.token_hex(4))


def _own_id(run_dir: Path, name: str) -> str | None:
    """Return the id that the folder keeps; None where it has none, or is the copy of one that has it, too."""
    found, place = _read_id(run_dir / name)
    if found is None:
        return None
    if place is not None and place != run_dir.resolve() and _read_id(place / name)[0] == found:
        return None
    return _keep_id(run_dir, name, found)


def _keep_id(run_dir: Path, name: str, chosen: str) -> str:
    """Keep an id with the folder that it was given in, by which the folder's copy is known; return the id."""
    write_text_atomic(
        run_dir / name, f"{chosen}\n{os.fsencode(run_dir.resolve()).decode(errors='replace')}\n"
    )
    return chosen


def _read_id(file: Path) -> tuple[str | None, Path | None]:
    """Read an id and the folder that it was given in, which files of older versions do not tell."""
    if not file.is_file():
        return None, None
    chosen, _, place = file.read_text(encoding="utf-8").strip().partition("\n")
    return chosen or None, Path(place) if place else None


def _open_wandb(wandb: Any, config: Config, run_dir: Path, is_resumed: bool) -> Tracker:
    tracker: Tracker = wandb.init(
        project=config.log.project,
        entity=config.log.entity,
        name=run_dir.resolve().name,
        id=_identify(run_dir),
        tags=list(config.log.tags),
        config=_keys(config),
        dir=str(run_dir),
        resume="allow" if is_resumed else None,
    )
    return tracker


def _open_trackio(trackio: Any, config: Config, run_dir: Path, is_resumed: bool) -> Tracker:
    tracker: Tracker = trackio.init(
        project=config.log.project,
        name=f"{run_dir.resolve().name}-{_identify(run_dir)}",  # it knows runs by their names
        config=_keys(config) | {"tags": list(config.log.tags)},
        resume="allow" if is_resumed else "never",
    )
    return tracker


class _Mlflow:
    """A run of MLflow; where it is tracked is set by MLFLOW_TRACKING_URI."""

    def __init__(self, mlflow: Any, config: Config, run_dir: Path, is_resumed: bool) -> None:
        self._mlflow = mlflow
        mlflow.set_experiment(config.log.project)
        if is_resumed and (known := _own_id(run_dir, MLFLOW_RUN)):
            mlflow.start_run(run_id=known)
            return
        tags = dict.fromkeys(config.log.tags, "true")
        run = mlflow.start_run(run_name=run_dir.resolve().name, tags=tags)
        _keep_id(run_dir, MLFLOW_RUN, run.info.run_id)
        params = [(key, str(value)[:PARAM_LENGTH]) for key, value in _flatten(_keys(config))]
        for start in range(0, len(params), PARAMS_AT_ONCE):
            mlflow.log_params(dict(params[start : start + PARAMS_AT_ONCE]))

    def log(self, values: Mapping[str, float], step: int) -> None:
        # MLflow's stores differ in what they make of NaN, so such values are left out.
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._mlflow.log_metrics(finite, step=step)

    def finish(self) -> None:
        self._mlflow.end_run()


class _TensorBoard:
    """TensorBoard's event files, without tensorboardX's thread: after its failure, callers wait for ever."""

    def __init__(self, folder: Path, resume_at: int | None) -> None:
        self._folder, self._resume_at = folder, resume_at
        self._writer: Any = None

    def log(self, values: Mapping[str, float], step: int) -> None:
        # Loaded at the first line: that takes a second, which no first episode should wait for.
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import scalar

        if self._writer is None:
            self._open()
        summary = Summary()
        for name, value in values.items():
            summary.MergeFrom(scalar(name, value))
        try:
            self._write(step=step, summary=summary)
            self._writer.flush()
        except OSError:
            with contextlib.suppress(OSError):  # the same one
                self._writer.close()
            raise

    def _open(self) -> None:
        from tensorboardX import RecordWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._writer = RecordWriter(str(self._folder / name))
        self._write(file_version="brain.Event:2")
        if self._resume_at is not None:  # TensorBoard hides what earlier files have from this update on
            self._write(step=self._resume_at, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        is_section = isinstance(value, Mapping) and value
        found += _flatten(value, f"{prefix}{key}.") if is_section else [(prefix + key, value)]
    return found
