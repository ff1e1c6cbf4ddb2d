"""The lock on a folder of a run: two processes that write there would destroy each other's files."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from empg_jax.errors import ConfigError, writing

FILENAME = "run.lock"


class RunLocked(ConfigError):
    """Another process trains a run in this folder."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock on a folder inside the block: the run's own, or that of its checkpoints.

    The kernel gives the lock back when its process dies, so a file left by a dead process locks nothing.

    Raises:
      RunLocked: another process holds the lock, or the folder cannot be written.
    """
    path = Path(folder) / FILENAME
    descriptor = _acquire(path)
    try:
        holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        with writing(path, RunLocked):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked: nobody else can have taken it
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Return whether another process holds the lock on a folder; nothing is made there."""
    try:
        descriptor = os.open(Path(folder) / FILENAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # this file system has no locks
    finally:
        os.close(descriptor)  # gives the lock back
    return False


def open_locked(path: Path, flags: int) -> int:
    """Open a file, made if need be, and hold its lock until the descriptor is closed.

    Raises:
      BlockingIOError: another process holds the lock.
      OSError: the file cannot be opened.
    """
    while True:
        descriptor = os.open(path, flags | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError:
            return descriptor  # this file system has no locks; going on without one is better than not at all
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)  # the holder before has just deleted this file: take the new one


def _acquire(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open_locked(path, os.O_RDWR)
    except BlockingIOError:
        raise RunLocked(
            f"{path.parent} is being trained by {_describe_holder(path)}: end that process "
            "first, or wait for it"
        ) from None
    except OSError as error:
        raise RunLocked(f"the folder {path.parent} of the run cannot be written: {error.strerror}") from None


def _describe_holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError):  # just being written
        return "another process"
