"""Files that are built once and shared by all processes of a machine.

A file's name is made from the content that it is built from, so that it never has to be brought up to date.
The first process that needs a file builds it under a temporary name and renames it when it is complete; other
processes wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import resource
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
            for left in path.parent.glob(f"{glob.escape(path.name)}.*.part"):  # of builders that were killed
                _remove(left)
            unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
            try:
                build(unfinished)
                os.replace(unfinished, path)
            finally:
                _remove(unfinished)
    return path


def allow_mapping(*paths: str | os.PathLike[str]) -> None:
    """Raise a limit of this process's address space by the size of files, or of folders, that it will map.

    The limit is for memory of its own; pages of a file are shared by all processes.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return
    files = (file for path in map(Path, paths) for file in (path, *path.rglob("*")) if file.is_file())
    limit = soft + sum(file.stat().st_size for file in files)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


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
