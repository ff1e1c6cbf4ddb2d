"""The protocol of sandboxes, their limits, and their errors."""

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
    """A sandbox that cannot be started or does not answer: a failure of the machine, not of the agent."""


class LostSandboxError(SandboxError):
    """A sandbox that worked and then stopped to answer: something that an agent may have brought about."""


class FileError(ValueError):
    """A file inside a sandbox that cannot be read or written. The agent may read the message."""


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """The resource limits of one sandbox.

    Attributes:
      memory_mb: MiB of address space of a process, and of resident memory of all processes together.
      processes: number of simultaneous processes.
      disk_mb: MiB of the task's folder, which is in memory; ``/tmp`` has the same limit.
      files: number of files and folders in each of the two.
      file_mb: MiB of one file.
      output_mb: MiB that one command may print before it is ended.
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
        """Refuse limits that are not positive."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"sandbox limit {field.name} must be a positive number, not {value!r}")


@dataclasses.dataclass(frozen=True, slots=True)
class ExecResult:
    """The result of a command.

    Attributes:
      output: interleaved stdout and stderr; the middle of a long output is left out.
      omitted: number of bytes left out.
      returncode: exit code; negative for a signal.
      reason: ``exit``, or the limit that ended the command: ``timeout``, ``memory``, ``processes``,
        ``files``, ``output``.
      report: bytes that the command wrote to descriptor 3, if the backend supports it.
    """

    output: str
    returncode: int
    reason: str = "exit"
    omitted: int = 0
    report: bytes = b""


class Sandbox(Protocol):
    """The protocol of sandboxes: an isolated file system and processes for one episode."""

    root: str  # path of the task's folder inside the sandbox

    def exec(
        self, command: str, timeout: float, *, env: Mapping[str, str] | None = None, stdin: bytes = b""
    ) -> ExecResult:
        """Run a shell command in the task's folder; all processes that it started end with the call.

        Raises:
          SandboxError: the sandbox no longer answers.
        """
        ...

    def read(self, path: str) -> bytes:
        """Return the bytes of a file in the task's folder or in /tmp.

        Raises:
          FileError: the file cannot be read.
        """
        ...

    def write(self, path: str, data: bytes) -> None:
        """Write a file; missing folders are created.

        Raises:
          FileError: the file cannot be written.
        """
        ...

    def snapshot(self) -> Tree:
        """Return the files of the task's folder."""
        ...

    def reset(self, tree: Tree) -> None:
        """Start again with these files; all earlier processes and other files are removed."""
        ...

    def close(self) -> None:
        """End the sandbox; this may be called more than once."""
        ...
