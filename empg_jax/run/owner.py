"""Whose a chosen folder of checkpoints is: the copy of a run must not go on in the folder of its original.

The folder holds ``owner.json`` with the place of the run. A run that was moved is not there any more, and the
moved one goes on; where a run is still there and names this folder, another one is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from empg_jax.errors import ConfigError, RefusedCheckpoint, writing
from empg_jax.parallel.hosts import Hosts
from empg_jax.run.folder import checkpoint_dir, folder_of
from empg_jax.run.step_folders import is_object_store, open_step_folders

if TYPE_CHECKING:
    from empg_jax.config import Config


def check_owner(config: Config, run_dir: Path, hosts: Hosts) -> None:
    """Check that a chosen folder of checkpoints is not that of another run; nothing is written.

    Raises:
      RefusedCheckpoint: it is; the message names the run.
    """
    if config.checkpoint.dir is None:
        return
    directory = checkpoint_dir(config, run_dir)
    if owner := hosts.first("owner", lambda: _find_other(directory, run_dir)):
        raise RefusedCheckpoint(
            f"checkpoint.dir={directory} belongs to the run {owner}, not to {run_dir}: go on with that "
            f"run, or copy the checkpoints and name the copy: --resume {run_dir} checkpoint.dir=COPY"
        )


def note_owner(config: Config, run_dir: Path) -> None:
    """Note in a chosen folder of checkpoints which run it belongs to; only the first host may call this.

    Raises:
      RunError: it cannot be written.
    """
    if config.checkpoint.dir is not None:
        directory = checkpoint_dir(config, run_dir)
        with writing(f"owner.json in {directory}"):
            open_step_folders(directory).write_owner(json.dumps({"run": str(run_dir.resolve())}))


def _find_other(directory: Path | str, run_dir: Path) -> str | None:
    """Return the place of another run that keeps its checkpoints in a folder, or None."""
    from empg_jax.config.yaml import read_yaml  # needs pydantic, which a new run does not

    owner = _parse(open_step_folders(directory).read_owner())
    if owner is None or Path(owner) == run_dir.resolve() or not (Path(owner) / "config.yaml").is_file():
        return None
    try:
        chosen = (read_yaml(Path(owner) / "config.yaml").get("checkpoint") or {}).get("dir")
        is_there = _whole(folder_of(chosen, Path(owner))) == _whole(directory)
    except ConfigError:  # it cannot go on as it is; what is here is still its own
        is_there = True
    return owner if is_there else None


def _parse(text: str) -> str | None:
    """Return the place of the run that the file names; None where it is damaged or missing."""
    try:
        return str(json.loads(text)["run"])
    except (ValueError, KeyError, TypeError):
        return None


def _whole(directory: Path | str) -> str:
    """Return one way to write a place."""
    if is_object_store(directory):
        return str(directory).rstrip("/")
    return str(Path(directory).resolve())
