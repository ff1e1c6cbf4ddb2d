"""Sandboxes whose first process is our guest: started, asked and ended from outside."""

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
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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
from empg_envs.swe.sandbox import ExecResult, FileError, Limits, SandboxError
from empg_envs.swe.seccomp import program
from empg_envs.swe.tree import LINK, ArchiveError, File, Tree, check_path

# Imported, not run as a script: so its compiled form is used, which saves a sixth of the start.
START = "import sys; sys.path.insert(0, sys.argv[1]); from empg_envs.swe.guest.main import main; main()"
START_SECONDS = 30.0
GRACE_SECONDS = 30.0  # on top of a command's own deadline, on a busy machine
KEEP_BYTES = 64 << 10  # of a command's output
REPORT_BYTES = 4 << 20
MAX_FRAME = 128 << 20
READ_BYTES = 1 << 20


class GuestSandbox(abc.ABC):
    """A sandbox that our guest serves; see `BubblewrapSandbox` for the cage around it."""

    root: str

    def __init__(self, limits: Limits, environment: Mapping[str, str]) -> None:
        """Nothing is started before `reset`.

        Args:
          limits: what the sandbox may use.
          environment: variables of every command.
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
        """Return the files of the task's folder; names that no patch can hold are left out.

        Raises:
          FileError: there are too many.
        """
        fields = self._ask("snapshot", self._limits.disk_mb << 20)
        tree: Tree = {}
        for name, mode, data in zip(fields[::3], fields[1::3], fields[2::3], strict=True):
            with contextlib.suppress(ArchiveError):
                tree[check_path(name.decode("utf-8", "surrogateescape"))] = File(data, int(mode, 8))
        return dict(sorted(tree.items()))

    def reset(self, tree: Tree) -> None:
        """End what runs and starts afresh; see `empg_envs.swe.sandbox.Sandbox`."""
        self.close()
        self._start()
        self._ask("unpack", [(path, mode, data) for path, (data, mode) in tree.items()])

    def close(self) -> None:
        """Kill the sandbox; its files, which live in its memory, end with it."""
        self._process = None
        self._finalizer()

    @abc.abstractmethod
    def _launch(self) -> subprocess.Popen[bytes]:
        """Return the process that speaks the guest's frames on its pipes."""

    def _config(self) -> dict[str, Any]:
        limits = self._limits
        return {
            "namespace": True,
            "root": self.root,
            "scratch": [self.root, "/tmp"],
            "memory": limits.memory_mb << 20,
            "processes": limits.processes,
            # Before Linux 5.14 the count went over all processes of the user, wherever they run.
            "threads": 4 * limits.processes if _kernel() >= (5, 14) else None,
            "files": limits.files,
            "file_size": limits.file_mb << 20,
            "output": limits.output_mb << 20,
            "cpus": limits.cpus,
        }

    def _start(self) -> None:
        self._process = self._launch()
        # Also when nobody calls close(): the object is collected, or the interpreter exits.
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
        """Return one request and its reply.

        Raises:
          FileError: the guest refused.
          SandboxError: it does not answer; the sandbox is closed then.
        """
        if self._process is None:
            raise SandboxError("the sandbox is closed: reset it first")
        try:
            self._send((operation, *arguments))
            status, *fields = self._receive(time.monotonic() + seconds + GRACE_SECONDS)
        except SandboxError:
            self.close()
            raise
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
        """Return a frame: nothing in it is trusted, so every length is checked."""
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
    """Namespaces, no network, a read-only base, and the task's files in a memory of limited size."""

    root = ROOT

    def __init__(self, interpreter: Interpreter, limits: Limits | None = None) -> None:
        """Check once per process that bubblewrap runs here.

        Args:
          interpreter: the Python that tasks run with.
          limits: what the sandbox may use.

        Raises:
          SandboxError: it does not, with the command that installs it.
        """
        probe()
        _compile_guest()
        super().__init__(limits or Limits(), interpreter.environment(ROOT, SCRATCH))
        self._interpreter = interpreter

    def _launch(self) -> subprocess.Popen[bytes]:
        filter_end, sink = os.pipe()
        try:
            os.write(sink, program())
            os.close(sink)
            size = self._limits.disk_mb << 20
            argv = command_line(self._interpreter, size, seccomp=filter_end)
            argv += [self._interpreter.base, "-I", "-S", "-B", "-c", START, GUEST_HOME]
            return _popen(argv, pass_fds=(filter_end,))
        finally:
            os.close(filter_end)


class LocalSandbox(GuestSandbox):
    """No cage at all: commands run as the present user, with resource limits only. By opt-in alone.

    Files live in a temporary folder; folders of workers that were killed are removed at the next start.
    """

    def __init__(self, interpreter: Interpreter, limits: Limits | None = None) -> None:
        """Remove what ended workers left, and make a folder."""
        self._home = Path(tempfile.gettempdir()) / f"empg-swe-{os.getuid()}"
        self._home.mkdir(mode=0o700, exist_ok=True)
        _remove_orphans(self._home)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=self._home))
        self.root = str(self._folder / "testbed")
        self._scratch = str(self._folder / "tmp")
        self._interpreter = interpreter
        super().__init__(limits or Limits(), interpreter.environment(self.root, self._scratch))

    def reset(self, tree: Tree) -> None:
        """As `GuestSandbox.reset`, without links: outside of a cage they could lead anywhere."""
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
    """Keep the guest's compiled form beside its source, where that may be written."""
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
    """Kill the outermost process of a sandbox; the kernel ends all inside with it."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _remove_orphans(home: Path) -> None:
    """Remove the folders of processes that do not live any more."""
    for folder in home.iterdir():
        owner = folder.name.partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _kernel() -> tuple[int, int]:
    numbers = platform.release().replace("-", ".").split(".")
    return (int(numbers[0]), int(numbers[1])) if numbers[0].isdigit() and numbers[1].isdigit() else (0, 0)
