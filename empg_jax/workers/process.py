"""The parent's side of one environment worker on this machine: a process, two pipes, lines of JSON.

Only `WorkerProcess.stop` blocks, and only for bounded times. Workers are started as
``python -m empg_envs.worker`` and never forked: a fork of a process with XLA's threads can deadlock, and
`multiprocessing`'s spawn would import the parent's main module, and JAX with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import termios
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from empg_envs.orphans import MARK, end_descendants
from empg_jax.workers.lines import LineReader, encode
from empg_jax.workers.variables import make_environment

READ_BYTES = 1 << 16
BLOCKED_BYTES = 1 << 15  # found in the pipe at once: the worker may have waited for room
STDERR_LINES = 30  # shown when a worker has died
STDERR_SEARCH = 1 << 16  # bytes at the end in which the stack of a hanging thread is looked for
KILL_SECONDS = 0.5  # granted to a worker to die of a signal that it can handle
STUCK_SECONDS = 5.0  # granted to the kernel to end a killed process


def start_local(pass_env: Sequence[str], selector: selectors.BaseSelector, owner: Any) -> WorkerProcess:
    """Start a worker on this machine; see `empg_jax.workers.backend.Start`."""
    return WorkerProcess(make_environment(pass_env), selector, owner)


class WorkerProcess:
    """A worker process on this machine; see `empg_jax.workers.backend.Process`."""

    def __init__(self, environment: Mapping[str, str], selector: selectors.BaseSelector, owner: Any):
        """Start the process; it waits for its first message (see `empg_envs.worker`).

        Args:
          environment: its environment variables.
          selector: watches both pipes until the process is stopped.
          owner: the selector's data for them.
        """
        self._mark = uuid.uuid4().hex
        self._selector, self._owner = selector, owner
        # A file, not a pipe: a pipe would fill up, and block the worker, while the parent is busy elsewhere.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed by stop)
        # Append mode: otherwise the worker would continue at its old offset after it has cut the file.
        fcntl.fcntl(self._stderr, fcntl.F_SETFL, os.O_APPEND)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-u", "-m", "empg_envs.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            env={**environment, MARK: self._mark},
            # A session of its own: Ctrl-C in the terminal does not reach it, and all processes that an
            # environment starts can be killed as one group.
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self.stdin, self.stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        os.set_blocking(self.stdout, False)
        selector.register(self.stdout, selectors.EVENT_READ, owner)
        self._outbox = bytearray()
        self._lines = LineReader()
        self.was_blocked = False
        self.queued_bytes = 0
        self.consumed_bytes = 0

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def send(self, message: Any) -> None:
        """Queue one message and write as much of it as the pipe takes."""
        self.send_bytes(encode(message))

    def send_bytes(self, line: bytes) -> None:
        """Queue one encoded message, as `send`."""
        self.queued_bytes += len(line)
        self._outbox += line
        self.write()

    def write(self) -> bool:
        """Write queued bytes; return whether any were written. `read` reports a broken pipe."""
        try:
            count = os.write(self.stdin, self._outbox)
        except BrokenPipeError:
            return False
        except BlockingIOError:
            count = 0
        del self._outbox[:count]
        # Watched exactly while something is unsent, or the selector would report room all the time.
        if not self._outbox:
            self._ignore(self.stdin)
        elif self.stdin not in self._selector.get_map():
            self._selector.register(self.stdin, selectors.EVENT_WRITE, self._owner)
        return count > 0

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Read the messages that have arrived.

        Returns:
          The complete messages, and whether the worker has closed its end, which means that it died.

        Raises:
          ProtocolError: a line is not a JSON object.
        """
        chunk, closed = self.read_bytes()
        return self._lines.feed(chunk), closed

    def read_bytes(self) -> tuple[bytes, bool]:
        """Read what has arrived, in pieces of lines; otherwise as `read`."""
        closed, found = False, b""
        while True:
            try:
                chunk = os.read(self.stdout, READ_BYTES)
            except BlockingIOError:
                break
            found += chunk
            if len(chunk) < READ_BYTES:
                closed = not chunk
                break
        self.was_blocked = len(found) >= BLOCKED_BYTES
        return found, closed

    def is_alive(self) -> bool:
        """Return False once the process has ended."""
        return self._process.poll() is None

    def hang_up(self) -> None:
        """Close the worker's stdin; an idle worker then closes its environments and exits."""
        self._ignore(self.stdin)
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]

    def stop(self, grace: float, first_signal: int | None = None, thread: int | None = None) -> str:
        """End the process and every process that it started, and reap it."""
        self._ignore(self.stdout)
        self._ignore(self.stdin)
        if first_signal is not None and self.is_alive():
            self._process.send_signal(first_signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
        # Processes that an environment left behind outlive the worker, in its group or in others. Those that
        # dropped the worker's variables are known by their parents only, as long as the worker lives.
        if self.is_alive():
            end_descendants(self.pid, self._mark)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STUCK_SECONDS)
        end_descendants(self.pid, self._mark)
        # Read before the pipe is closed: it tells which commands the worker had taken when it ended.
        self.consumed_bytes = self.queued_bytes - len(self._outbox) - self._count_unread()
        status = _describe_status(self._process.returncode)
        tail = self._tail(thread)
        self.hang_up()
        self._process.stdout.close()  # type: ignore[union-attr]
        self._stderr.close()
        return f"{status}; last lines of its stderr:\n{tail}" if tail else status

    def _ignore(self, descriptor: int) -> None:
        """Watch a pipe no longer."""
        if descriptor in self._selector.get_map():
            self._selector.unregister(descriptor)

    def _count_unread(self) -> int:
        """Count the bytes that the worker left in the pipe: their commands were never started."""
        if self._process.stdin is None or self._process.stdin.closed:
            return 0
        try:
            answer = fcntl.ioctl(self.stdin, termios.FIONREAD, b"\0" * 4)
        except OSError:  # not every system supports this at the writing end
            return 0
        return int.from_bytes(answer, sys.byteorder)

    def _tail(self, thread: int | None) -> str:
        """Return the stack of a thread as faulthandler wrote it, or else the last lines."""
        size = os.fstat(self._stderr.fileno()).st_size
        start = max(0, size - STDERR_SEARCH)
        text = os.pread(self._stderr.fileno(), STDERR_SEARCH, start).decode(errors="replace")
        if thread is not None:
            stack = re.search(rf"thread 0x0*{thread:x}\b.*\n(?:  .*\n?)*", text, re.IGNORECASE)
            if stack is not None:
                return stack[0].strip()
        return "\n".join(text[-8192:].splitlines()[-STDERR_LINES:])


def _describe_status(code: int | None) -> str:
    if code is None:
        return "killed, but still there"
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
