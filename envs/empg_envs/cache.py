"""Files that are built once and shared by all processes of a machine.

A file's name is made from the content that it is built from, so that it never has to be brought up to date.
The first process that needs a file builds it under a temporary name and renames it when it is complete; other
processes wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Return the folder for files of a kind, below ``XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "empg-jax" / kind


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """Return ``path``; where it does not exist, ``build`` writes a file or folder that then gets this name.

    Raises:
      OSError: the folder cannot be written.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f"{path.name}.lock")):
        if not path.exists():
            unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
            try:
                build(unfinished)
                os.replace(unfinished, path)
            finally:
                _remove(unfinished)
    return path


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
