"""What every sandbox offers, its limits, and the errors it may raise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from empg_envs.swe.tree import Tree

INSTALL = (
    "bubblewrap 0.8 or newer is needed to run agents' commands in a cage: install it (Debian, Ubuntu: "
    "apt-get install bubblewrap; Fedora: dnf install bubblewrap) and allow user namespaces, or choose "
    "backend 'docker'"
)


class SandboxError(RuntimeError):
    """A sandbox could not be started, or does not answer any more: a failure of the machine."""


class FileError(ValueError):
    """A file inside a sandbox cannot be read or written; the message is fit for the agent."""


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What one sandbox may use.

    Attributes:
      memory_mb: address space of a process, and resident memory of all together.
      processes: processes at a time.
      disk_mb: the task's folder, which lives in memory; ``/tmp`` gets the same.
      files: files and folders in each of the two.
      file_mb: size of one file.
      output_mb: what one command may print before it is ended.
      cpus: processor seconds of a process per second of its deadline.
    """

    memory_mb: int = 1024
    processes: int = 64
    disk_mb: int = 64
    files: int = 20_000
    file_mb: int = 32
    output_mb: int = 16
    cpus: float = 2.0

    def __post_init__(self) -> None:
        """Raise ValueError for a limit that is not positive."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"sandbox limit {field.name} must be a positive number, not {value!r}")


@dataclasses.dataclass(frozen=True, slots=True)
class ExecResult:
    """How a command ended.

    Attributes:
      output: stdout and stderr as they came; the middle of a long one is left out.
      omitted: bytes left out.
      returncode: its exit code; negative for a signal.
      reason: ``exit``, or the limit that ended it: ``timeout``, ``memory``, ``processes``, ``files``,
        ``output``.
      report: what it wrote to descriptor 3, where the backend has one.
    """

    output: str
    returncode: int
    reason: str = "exit"
    omitted: int = 0
    report: bytes = b""


class Sandbox(Protocol):
    """A place where an agent's commands run and its files lie; it holds one episode."""

    root: str  # the task's folder inside

    def exec(
        self, command: str, timeout: float, *, env: Mapping[str, str] | None = None, stdin: bytes = b""
    ) -> ExecResult:
        """Run a shell command in the task's folder; nothing that it started outlives the call.

        Raises:
          SandboxError: the sandbox does not answer any more.
        """
        ...

    def read(self, path: str) -> bytes:
        """Return a file of the task's folder or of /tmp.

        Raises:
          FileError: it cannot be read.
        """
        ...

    def write(self, path: str, data: bytes) -> None:
        """Write a file, with its folders.

        Raises:
          FileError: it cannot be written.
        """
        ...

    def snapshot(self) -> Tree:
        """Return the files of the task's folder."""
        ...

    def reset(self, tree: Tree) -> None:
        """Begin anew with these files: no process and no other file of the past is left."""
        ...

    def close(self) -> None:
        """End everything; may be called more than once."""
        ...
