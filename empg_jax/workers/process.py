"""The parent's side of one environment worker: a process, two pipes, lines of JSON.

Only `WorkerProcess.stop` blocks, and only for bounded times. Workers are started as
``python -m empg_envs.worker`` and never forked: a fork of a process with XLA's threads can deadlock, and
`multiprocessing`'s spawn would import the parent's main module, and JAX with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import termios
from collections.abc import Mapping
from typing import Any

READ_BYTES = 1 << 16
STDERR_KEEP = 4 << 20  # a worker's stderr file is emptied when it grows beyond this
STDERR_LINES = 30  # shown when a worker has died
KILL_SECONDS = 0.5  # granted to a worker to die of a signal that it can handle
STUCK_SECONDS = 5.0  # granted to the kernel to end a killed process


class ProtocolError(Exception):
    """A worker wrote something that is not a line of the protocol."""


class WorkerProcess:
    """A worker process, with non-blocking transfer of whole messages."""

    def __init__(self, hello: Mapping[str, Any]):
        """Start the process and queue its first message.

        Args:
          hello: ``env``, ``options`` and ``memory_limit_mb``, see `empg_envs.worker`.
        """
        # A file, not a pipe: a pipe would fill up, and block the worker, while the parent is busy elsewhere.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed by stop)
        # Append mode: otherwise the worker would continue at its old offset after `trim_stderr`.
        fcntl.fcntl(self._stderr, fcntl.F_SETFL, os.O_APPEND)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-u", "-m", "empg_envs.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            env=_make_environment(),
            # A session of its own: Ctrl-C in the terminal does not reach it, and all processes that an
            # environment starts can be killed as one group.
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self.stdin, self.stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        os.set_blocking(self.stdout, False)
        self._outbox = bytearray()
        self._inbox = b""
        self.queued_bytes = 0  # given to `send` so far
        self.consumed_bytes = 0  # of these, read by the worker; known after `stop`
        self.send(dict(hello))

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def has_unsent(self) -> bool:
        """True while a message waits for room in the pipe."""
        return bool(self._outbox)

    def send(self, message: Any) -> None:
        """Queue one message and write as much of it as the pipe takes."""
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        self.queued_bytes += len(line)
        self._outbox += line
        self.write()

    def write(self) -> bool:
        """Write queued bytes; return whether any were written. `read` reports a broken pipe."""
        try:
            count = os.write(self.stdin, self._outbox)
        except BlockingIOError:
            return False
        except BrokenPipeError:
            return False
        del self._outbox[:count]
        return count > 0

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Read the bytes that have arrived.

        Returns:
          The complete messages, and whether the worker has closed its end, which means that it died.

        Raises:
          ProtocolError: a line is not a JSON object.
        """
        closed = False
        while True:
            try:
                chunk = os.read(self.stdout, READ_BYTES)
            except BlockingIOError:
                break
            self._inbox += chunk
            if len(chunk) < READ_BYTES:
                closed = not chunk
                break
        if b"\n" not in self._inbox:
            return [], closed
        *lines, rest = self._inbox.split(b"\n")
        self._inbox = rest
        return [_decode(line) for line in lines], closed

    def trim_stderr(self) -> None:
        """Empty the stderr file of a worker that prints a lot."""
        if os.fstat(self._stderr.fileno()).st_size > STDERR_KEEP:
            os.ftruncate(self._stderr.fileno(), 0)

    def is_alive(self) -> bool:
        """Return False once the process has ended."""
        return self._process.poll() is None

    def hang_up(self) -> None:
        """Close the worker's stdin; an idle worker then closes its environments and exits."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]

    def stop(self, grace: float, first_signal: int | None = None) -> str:
        """End the process and every process that it started, and reap it.

        Args:
          grace: seconds in which it may end by itself (it has died or was hung up), before it is killed.
          first_signal: a signal to send at once; SIGABRT makes a hanging worker write its stack.

        Returns:
          A description of how it ended, with the last lines of its stderr.
        """
        if first_signal is not None and self.is_alive():
            self._process.send_signal(first_signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
        # Processes that an environment left behind outlive the worker, so the whole group is killed.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STUCK_SECONDS)
        # Read before the pipe is closed: it tells which commands the worker had taken when it ended.
        self.consumed_bytes = self.queued_bytes - len(self._outbox) - self._count_unread()
        status = _describe_status(self._process.returncode)
        tail = self._tail()
        self.hang_up()
        self._process.stdout.close()  # type: ignore[union-attr]
        self._stderr.close()
        return f"{status}; last lines of its stderr:\n{tail}" if tail else status

    def _count_unread(self) -> int:
        """Count the bytes that the worker left in the pipe: their commands were never started."""
        if self._process.stdin is None or self._process.stdin.closed:
            return 0
        try:
            answer = fcntl.ioctl(self.stdin, termios.FIONREAD, b"\0" * 4)
        except OSError:  # not every system supports this at the writing end
            return 0
        return int.from_bytes(answer, sys.byteorder)

    def _tail(self) -> str:
        size = os.fstat(self._stderr.fileno()).st_size
        text = os.pread(self._stderr.fileno(), 8192, max(0, size - 8192)).decode(errors="replace")
        return "\n".join(text.splitlines()[-STDERR_LINES:])


def _decode(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError as error:
        raise ProtocolError(f"not JSON: {bytes(line[:80])!r}") from error
    if not isinstance(message, dict):
        raise ProtocolError(f"not an object: {bytes(line[:80])!r}")
    return message


def _describe_status(code: int | None) -> str:
    if code is None:
        return "killed, but still there"
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _make_environment() -> dict[str, str]:
    """Build the worker's environment variables.

    The worker finds the modules that this process finds, and those of the working directory. String hashes
    are fixed, so that an environment that iterates over a set behaves alike in every worker. Numeric
    libraries get one thread: parallelism comes from the number of workers.
    """
    here = os.getcwd()
    paths = dict.fromkeys([path or here for path in sys.path] + [here])
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**threads, **os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}
