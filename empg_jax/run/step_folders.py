"""Where checkpoints lie: one folder per step, in a folder of the file system or in an object store."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Protocol

from empg_jax.files import write_text_atomic

UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that is being written or deleted


class StepFolders(Protocol):
    """What checkpoints ask of the place where they lie. A kill at any moment loses no complete step.

    Attributes:
      directory: the folder above all steps; ``directory / name`` is a path for orbax.
      reference: path that the frozen reference policy is written to.
      owner: path of the file that names the run.
    """

    directory: Any
    reference: Any
    owner: Any

    @property
    def steps(self) -> list[int]:
        """Complete steps, ascending."""

    def path(self, step: int) -> Any:
        """Return the folder that a step is read from."""

    def new_name(self, step: int) -> str:
        """Return the name to write a step under; it has a suffix where the step is there already."""

    def make(self) -> None:
        """Make the folder above all steps."""

    def swap(self, name: str) -> None:
        """Put a step that was written again, under a name with a suffix, in the place of the old one."""

    def remove(self, step: int) -> None:
        """Delete a step; it does not count from the first moment on."""

    def set_aside(self, step: int) -> None:
        """Keep a step on disk without counting it."""

    def recover(self) -> None:
        """Finish or undo what a killed process left half done."""

    def drop_reference(self) -> None:
        """Make room for a new reference policy."""

    def find_reference(self) -> Any:
        """Return the path that the reference policy is read from."""

    def read_owner(self) -> str:
        """Return the text of the file that names the run; empty where there is none."""

    def write_owner(self, text: str) -> None:
        """Write the file that names the run."""


def is_object_store(directory: str | Path) -> bool:
    """Return whether a directory is an object store's."""
    return "://" in str(directory)


def open_step_folders(directory: str | Path) -> StepFolders:
    """Return the steps in a folder, or below the URL of an object store.

    Raises:
      RefusedCheckpoint: the library for the object store is not installed.
    """
    if not is_object_store(directory):
        return LocalFolders(Path(directory))
    # Imported only where it is chosen: it takes a second, and etils.
    from empg_jax.run.object_store import StoreFolders

    return StoreFolders(str(directory))


class LocalFolders:
    """The steps in a folder of the file system, where a folder can be renamed in one act.

    A folder gets its name only when it is complete; orbax renames it. A step that is there already is written
    under ``<step>.new``.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        # Inside: what is beside the folder may belong to another run.
        self.reference = self.directory / "reference"
        self.owner = self.directory / "owner.json"

    @property
    def steps(self) -> list[int]:
        """Steps on disk, ascending."""
        return sorted(int(path.name) for path in self.directory.glob("*") if path.name.isdigit())

    def path(self, step: int) -> Path:
        """Return the folder of a step."""
        return self.directory / str(step)

    def new_name(self, step: int) -> str:
        """Return ``<step>``, or ``<step>.new`` if the step is there."""
        return f"{step}.new" if self.path(step).exists() else str(step)

    def make(self) -> None:
        """Make the folder above all steps."""
        self.directory.mkdir(parents=True, exist_ok=True)

    def swap(self, name: str) -> None:
        """Put a step that was written again in the place of the old one."""
        path = self.directory / name
        target, old = path.with_suffix(""), path.with_suffix(".old")
        target.rename(old)
        path.rename(target)
        shutil.rmtree(old)

    def remove(self, step: int) -> None:
        """Delete a step."""
        # Renamed first: a kill in the middle leaves no step that is half deleted.
        shutil.rmtree(self.path(step).rename(self.directory / f"{step}{UNFINISHED}"))

    def set_aside(self, step: int) -> None:
        """Rename a step to ``<step>.aside``."""
        target = self.directory / f"{step}.aside"
        shutil.rmtree(target, ignore_errors=True)
        self.path(step).rename(target)

    def recover(self) -> None:
        """Finish or undo what a killed process left half done."""
        for path in sorted(self.directory.glob("*.new")):
            target = path.with_suffix("")
            if target.exists() or not target.name.isdigit():
                shutil.rmtree(path)  # not known to be good, and the one before it is there
            else:
                path.rename(target)
        for path in sorted(self.directory.glob("*.old")):
            if path.with_suffix("").exists() or not path.stem.isdigit():
                shutil.rmtree(path)
            else:
                path.rename(path.with_suffix(""))
        for path in self.directory.glob(f"*{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)

    def drop_reference(self) -> None:
        """Leave it to orbax, which replaces the folder in one act."""

    def find_reference(self) -> Path:
        """Return the folder inside; a run of an older version has it beside the steps' folder."""
        beside = self.directory.parent / "reference"
        return beside if beside.is_dir() and not self.reference.is_dir() else self.reference

    def read_owner(self) -> str:
        """Return the text of the file that names the run."""
        return self.owner.read_text(encoding="utf-8", errors="replace") if self.owner.is_file() else ""

    def write_owner(self, text: str) -> None:
        """Write the file that names the run."""
        self.make()
        write_text_atomic(self.owner, text)
