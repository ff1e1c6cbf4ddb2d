"""The run's folder, and the files in it that record how the run was made."""

from __future__ import annotations

import contextlib
import datetime
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_jax.config.places import expand
from empg_jax.errors import ConfigError, writing
from empg_jax.files import format_json, write_json_atomic, write_together
from empg_jax.report.environment import describe_environment
from empg_jax.report.record import has_results
from empg_jax.run.lock import FILENAME as LOCK
from empg_jax.run.step_folders import is_object_store, open_step_folders

if TYPE_CHECKING:
    from empg_jax.config import Config


def create_run_dir(config: Config) -> Path:
    """Make the folder of a new run: ``config.run_dir``, or ``runs/<name>-<time>``.

    Raises:
      ConfigError: the folder already holds a run, or cannot be made.
    """
    if config.run_dir is not None:
        run_dir = expand(config.run_dir, "run_dir")
        if (run_dir / "config.yaml").exists():
            raise ConfigError(
                f"run_dir={config.run_dir} already holds a run: go on with --resume {config.run_dir}, "
                "or choose another run_dir"
            )
        return _make(run_dir, exist_ok=True)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    # Two runs may start in the same second, so a taken name gets a number.
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        run_dir = Path("runs") / f"{config.name}-{stamp}{suffix}"
        if not run_dir.exists():
            return _make(run_dir, exist_ok=False)
    raise ConfigError(f"runs/{config.name}-{stamp} and its numbered siblings exist: set run_dir")


@contextlib.contextmanager
def undone_if_refused(config: Config, run_dir: Path) -> Iterator[None]:
    """Remove what a new run wrote into its locked folder, if it is refused before its first checkpoint.

    What lay there before stays; a folder without anything else goes, too, so that its name is free again.

    Raises:
      ConfigError: the refusal, as the block raised it.
    """
    kept = {path for path in run_dir.iterdir() if path.name != LOCK}
    try:
        yield
    except ConfigError:
        folders = open_step_folders(checkpoint_dir(config, run_dir))
        if not folders.steps:
            folders.owner.unlink(missing_ok=True)
            _remove(set(run_dir.iterdir()) - kept)
            with contextlib.suppress(OSError):  # something of somebody else's is in it
                run_dir.rmdir()
        raise


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def checkpoint_dir(config: Config, run_dir: Path) -> Path | str:
    """Return the folder of a run's checkpoints, or the URL of an object store."""
    return folder_of(config.checkpoint.dir, run_dir)


def folder_of(chosen: str | None, run_dir: Path) -> Path | str:
    """Return the folder of checkpoints, or the URL, for a run's value of ``checkpoint.dir``."""
    if chosen is not None and is_object_store(chosen):
        return chosen  # as a path it would lose a slash
    return expand(chosen, "checkpoint.dir") if chosen else run_dir / "checkpoints"


def split_checkpoint(path: Path) -> tuple[Path, int | None]:
    """Split ``RUN/checkpoints/STEP`` into run folder and step; any other path has the step None."""
    is_run = (path / "config.yaml").exists()  # whatever its name
    if path.name.isdigit() and path.parent.name == "checkpoints" and not is_run:
        return path.parent.parent, int(path.name)
    return path, None


def names_run(path: Path) -> bool:
    """Return whether a path is a folder, or ``RUN/checkpoints/STEP`` of a run that keeps those elsewhere."""
    run_dir, step = split_checkpoint(path)
    is_elsewhere = step is not None and not path.parent.exists() and (run_dir / "config.yaml").is_file()
    return is_elsewhere or path.is_dir()


def check_run(path: Path) -> None:
    """Refuse what cannot be a run's or a checkpoint's folder by its look.

    Raises:
      ConfigError: it is no folder, or it is a model's.
    """
    if not names_run(path):
        raise ConfigError(f"{path} is not a folder: name a run, or a checkpoint inside one")
    if (path / "config.json").is_file() and not (path / "config.yaml").is_file():
        raise ConfigError(
            f"{path} is a model, not a run: 'empg-jax eval' takes it where --env NAME or --config CONFIG "
            "says how prompts are built"
        )


def is_finished(run_dir: Path, config: Config) -> bool:
    """Return whether a run has nothing left to do on resume.

    Raises:
      ConfigError: the run has made more updates than ``train.updates``.
      CheckpointError: its checkpoints lie in an object store that cannot be read.
    """
    steps = open_step_folders(checkpoint_dir(config, run_dir)).steps
    made, wanted = max(steps, default=0), config.train.updates
    if wanted < made:
        raise ConfigError(
            f"train.updates={wanted}: the run {run_dir} has made {made} updates already; give "
            f"train.updates={made} or more"
        )
    return has_results(run_dir, wanted)


def write_run_info(run_dir: Path, config: Config, *, resumed: bool = False) -> None:
    """Write ``config.yaml`` (resolved) and ``environment.json``.

    A resumed run keeps the first ``environment.json`` and writes ``environment.1.json``, and so on.

    Raises:
      RunError: there is no room for both.
    """
    path, info = run_dir / "config.yaml", _info_path(run_dir, _next_attempt(run_dir) if resumed else 0)
    with writing(f"{path} or {info.name}"):
        write_together({path: config.to_yaml(), info: format_json(describe_environment(config.seed))})


def add_run_info(run_dir: Path, values: Mapping[str, Any]) -> None:
    """Add values that are known only later to the newest attempt's ``environment.json``."""
    path = _info_path(run_dir, _next_attempt(run_dir) - 1)
    with writing(path):
        write_json_atomic(path, json.loads(path.read_text(encoding="utf-8")) | dict(values))


def _info_path(run_dir: Path, attempt: int) -> Path:
    return run_dir / (f"environment.{attempt}.json" if attempt else "environment.json")


def _next_attempt(run_dir: Path) -> int:
    attempt = 0
    while _info_path(run_dir, attempt).exists():
        attempt += 1
    return attempt


def _make(run_dir: Path, *, exist_ok: bool) -> Path:
    try:
        run_dir.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        raise ConfigError(f"cannot make the run folder {run_dir}: {error.strerror}") from None
    return run_dir
