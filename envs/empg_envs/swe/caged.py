"""Sandboxes whose first process is our guest program, which is controlled from outside."""

from __future__ import annotations

import abc
import contextlib
import functools
import marshal
import os
import platform
import py_compile
import select
import shutil
import subprocess
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from empg_envs.swe import fixed
from empg_envs.swe.bubblewrap import (
    GUEST,
    GUEST_HOME,
    HERE,
    ROOT,
    SCRATCH,
    Interpreter,
    command_line,
    probe,
)
from empg_envs.swe.sandbox import ExecResult, FileError, Limits, LostSandboxError, SandboxError
from empg_envs.swe.seccomp import program
from empg_envs.swe.tree import LINK, ArchiveError, File, Tree, check_path

# The guest is imported, not run as a script, so that Python uses its compiled form: a sixth of the start.
START = "import sys; sys.path.insert(0, sys.argv[1]); from empg_envs.swe.guest.main import main; main()"
START_SECONDS = 30.0
GRACE_SECONDS = 30.0  # added to a command's own deadline, for busy machines
KEEP_BYTES = 64 << 10  # kept bytes of a command's output
REPORT_BYTES = 16 << 20
MAX_FRAME = 128 << 20
READ_BYTES = 1 << 20


class GuestSandbox(abc.ABC):
    """A sandbox that is served by our guest; `BubblewrapSandbox` isolates it."""

    root: str

    def __init__(self, limits: Limits, environment: Mapping[str, str]) -> None:
        """Store the settings; `reset` starts the sandbox.

        Args:
          limits: limits of the sandbox.
          environment: environment variables of every command.
        """
        self._limits = limits
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: Callable[[], object] = lambda: None

    def exec(
        self,
        command: str,
        timeout: float,
        *,
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
    ) -> ExecResult:
        """Run ``bash -c command``; see `empg_envs.swe.sandbox.Sandbox`."""
        argv = ["/bin/bash", "--noprofile", "--norc", "-c", command.replace("\0", "")]
        variables = {**self._environment, **(env or {})}
        request = ("run", argv, variables, self.root, stdin, float(timeout), KEEP_BYTES, REPORT_BYTES)
        reason, code, head, tail, omitted, report = self._ask(*request, seconds=timeout)
        middle = f"\n[{int(omitted)} bytes left out]\n".encode() if int(omitted) else b""
        output = (head + middle + tail).decode("utf-8", "replace")
        return ExecResult(output, int(code), reason.decode(), int(omitted), report)

    def read(self, path: str) -> bytes:
        """Return a file's bytes; see `empg_envs.swe.sandbox.Sandbox`."""
        return self._ask("read", path.replace("\0", ""), READ_BYTES)[0]

    def write(self, path: str, data: bytes) -> None:
        """Write a file; see `empg_envs.swe.sandbox.Sandbox`."""
        self._ask("write", path.replace("\0", ""), data)

    def snapshot(self) -> Tree:
        """Return the files of the task's folder; names that no patch can contain are left out.

        Raises:
          FileError: there are too many files.
        """
        fields = self._ask("snapshot", self._limits.disk_mb << 20)
        tree: Tree = {}
        for name, mode, data in zip(fields[::3], fields[1::3], fields[2::3], strict=True):
            with contextlib.suppress(ArchiveError):
                tree[check_path(name.decode("utf-8", "surrogateescape"))] = File(data, int(mode, 8))
        return dict(sorted(tree.items()))

    def reset(self, tree: Tree) -> None:
        """End all processes and start again; see `empg_envs.swe.sandbox.Sandbox`."""
        self.close()
        self._start()
        self._ask("unpack", [(path, mode, data) for path, (data, mode) in tree.items()])

    def reset_fixed(self, tree: Tree) -> None:
        """Reset with files that no command can change, where the sandbox can see to that.

        The names in the root folder cannot be listed then: who does not know a name does not find it.

        Raises:
          FileError: the files do not fit together.
        """
        self.reset(tree)

    def close(self) -> None:
        """Kill the sandbox; its files are in memory and disappear with it."""
        self._process = None
        self._finalizer()

    @abc.abstractmethod
    def _launch(self) -> subprocess.Popen[bytes]:
        """Start and return the process whose pipes carry the guest's frames."""

    def _config(self) -> dict[str, Any]:
        limits = self._limits
        return {
            "namespace": True,
            "root": self.root,
            "scratch": [self.root, "/tmp"],
            "memory": limits.memory_mb << 20,
            "processes": limits.processes,
            # Before Linux 5.14 the kernel counts all processes of the user on the machine, so set no limit.
            "threads": 4 * limits.processes if _kernel() >= (5, 14) else None,
            "files": limits.files,
            "file_size": limits.file_mb << 20,
            "output": limits.output_mb << 20,
            "cpus": limits.cpus,
        }

    def _start(self) -> None:
        self._process = self._launch()
        # The finalizer also ends the sandbox without a call of close(): at garbage collection or exit.
        self._finalizer = weakref.finalize(self, _end, self._process)
        try:
            self._send(self._config())
            fields = self._receive(time.monotonic() + START_SECONDS)
        except SandboxError as error:
            said = self._last_words()
            self.close()
            raise SandboxError(f"the sandbox did not start: {said or error}") from None
        if fields != [b"ready"]:
            self.close()
            raise SandboxError(f"the sandbox started with {fields!r}")

    def _ask(self, operation: str, *arguments: Any, seconds: float = 0.0) -> list[bytes]:
        """Send one request and return its reply.

        Raises:
          FileError: the guest refused the request.
          LostSandboxError: the guest does not answer; the sandbox is then closed.
        """
        if self._process is None:
            raise SandboxError("the sandbox is closed: reset it first")
        try:
            self._send((operation, *arguments))
            status, *fields = self._receive(time.monotonic() + seconds + GRACE_SECONDS)
        except SandboxError as error:
            self.close()
            raise LostSandboxError(str(error)) from None
        if status != b"ok":
            raise FileError(fields[0].decode("utf-8", "replace") if fields else "refused")
        return fields

    def _send(self, request: Any) -> None:
        assert self._process is not None and self._process.stdin is not None
        body = marshal.dumps(request)
        try:
            self._process.stdin.write(len(body).to_bytes(4, "big") + body)
            self._process.stdin.flush()
        except OSError as error:
            raise SandboxError(f"the sandbox has ended ({error})") from None

    def _receive(self, deadline: float) -> list[bytes]:
        """Receive one frame. The guest is not trusted, so every length is checked."""
        size = int.from_bytes(self._read(4, deadline), "big")
        if size > MAX_FRAME:
            raise SandboxError(f"the sandbox answered with {size} bytes")
        body, fields, place = self._read(size, deadline), [], 0
        while place < size:
            length = int.from_bytes(body[place : place + 4], "big")
            fields.append(body[place + 4 : place + 4 + length])
            place += 4 + length
        if place != size or not fields:
            raise SandboxError("the sandbox answered with a broken frame")
        return fields

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        number = self._process.stdout.fileno()
        parts = bytearray()
        while len(parts) < size:
            ready, _, _ = select.select([number], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise SandboxError("the sandbox does not answer")
            data = os.read(number, min(size - len(parts), 1 << 20))
            if not data:
                raise SandboxError("the sandbox has ended")
            parts += data
        return bytes(parts)

    def _last_words(self) -> str:
        if self._process is None or self._process.stderr is None:
            return ""
        self._process.kill()
        return self._process.stderr.read(2000).decode("utf-8", "replace").strip()


class BubblewrapSandbox(GuestSandbox):
    """A sandbox by namespaces: no network, a read-only base, and the task's files in limited memory."""

    root = ROOT

    def __init__(self, interpreter: Interpreter, limits: Limits | None = None) -> None:
        """Check once per process that bubblewrap runs here.

        Args:
          interpreter: the Python interpreter of tasks.
          limits: limits of the sandbox.

        Raises:
          SandboxError: bubblewrap does not run here. The message contains the command to install it.
        """
        probe()
        _compile_guest()
        super().__init__(limits or Limits(), interpreter.environment(ROOT, SCRATCH))
        self._interpreter = interpreter
        self._shown: Path | None = None

    def reset_fixed(self, tree: Tree) -> None:
        """Reset with files in a folder of the machine that is mounted read-only."""
        self.close()
        self._shown = fixed.make_folder(fixed.make_home("empg-swe-judge"))
        # The folder goes at garbage collection or exit, too; after a kill, with the next one's start.
        self._unshow = weakref.finalize(self, fixed.remove, self._shown)
        try:
            fixed.write_tree(self._shown, tree)
            self._start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the guest and remove the folder that it showed."""
        super().close()
        if self._shown is not None:
            self._unshow()
            self._shown = None

    def _config(self) -> dict[str, Any]:
        # Without files of its own in the root, only /tmp counts.
        return super()._config() | ({} if self._shown is None else {"scratch": [SCRATCH]})

    def _launch(self) -> subprocess.Popen[bytes]:
        filter_end, sink = os.pipe()
        try:
            os.write(sink, program())
            os.close(sink)
            size = self._limits.disk_mb << 20
            argv = command_line(self._interpreter, size, seccomp=filter_end, shown=self._shown)
            argv += [self._interpreter.base, "-I", "-S", "-B", "-c", START, GUEST_HOME]
            return _popen(argv, pass_fds=(filter_end,))
        finally:
            os.close(filter_end)


class LocalSandbox(GuestSandbox):
    """A backend without isolation: commands run as the current user, with resource limits only.

    It must be enabled explicitly. Files are in a temporary folder. The folders of killed workers are removed
    at the next start.
    """

    def __init__(self, interpreter: Interpreter, limits: Limits | None = None) -> None:
        """Remove the folders of ended workers, and create a new folder."""
        self._folder = fixed.make_folder(fixed.make_home("empg-swe"))
        self.root = str(self._folder / "testbed")
        self._scratch = str(self._folder / "tmp")
        self._interpreter = interpreter
        super().__init__(limits or Limits(), interpreter.environment(self.root, self._scratch))

    def reset(self, tree: Tree) -> None:
        """Reset as in `GuestSandbox`, but without links, which could lead outside of the folder."""
        super().reset({path: file for path, file in tree.items() if file.mode != LINK})

    def close(self) -> None:
        """End the guest and remove the folder's contents."""
        super().close()
        for folder in (self.root, self._scratch):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "namespace": False, "scratch": [self.root, self._scratch]}

    def _launch(self) -> subprocess.Popen[bytes]:
        for folder in (self.root, self._scratch):
            os.makedirs(folder)
        return _popen([self._interpreter.base, "-I", "-S", "-B", "-c", START, str(HERE.parents[1])])


@functools.cache
def _compile_guest() -> None:
    """Compile the guest next to its source if that folder is writable."""
    for source in GUEST.glob("*.py"):
        with contextlib.suppress(OSError):
            py_compile.compile(str(source), doraise=True)


def _popen(argv: list[str], pass_fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=pass_fds,
            cwd="/",
            env={},
        )
    except OSError as error:
        raise SandboxError(f"cannot run {argv[0]!r}: {error}") from error


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the outermost process of a sandbox; the kernel then ends all processes inside."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _kernel() -> tuple[int, int]:
    numbers = platform.release().replace("-", ".").split(".")
    return (int(numbers[0]), int(numbers[1])) if numbers[0].isdigit() and numbers[1].isdigit() else (0, 0)
