"""A worker on another machine: a process there, driven by calls from the pool's machine.

The process is the same as on the pool's machine. So all that a pool knows of its workers holds here, too:
which command hangs and where, what was read before a death, the last words, the memory limit, the end of
everything that an environment started. The calls come from several threads, one for each kind of call. Ray
moves them (`empg_jax.workers.ray_backend`); this module knows nothing of it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
from collections.abc import Mapping, Sequence

from empg_jax import __version__
from empg_jax.workers.process import WorkerProcess
from empg_jax.workers.variables import make_environment, merge_environment

LOOK_SECONDS = 0.2  # between two looks whether a silent process is alive


class Relay:
    """One worker process, and the bytes that go to it and come from it."""

    def __init__(self, version: str, pass_env: Sequence[str], brought: Mapping[str, str], folder: str):
        """Start the process.

        Args:
          version: of this package on the pool's machine.
          pass_env: names of further environment variables that it gets.
          brought: the environment variables that it would have on the pool's machine.
          folder: the working folder there; used here, too, if it exists.

        Raises:
          RuntimeError: this machine has another version.
        """
        if version != __version__:
            raise RuntimeError(f"this node has empg-jax {__version__}, the trainer {version}")
        with contextlib.suppress(OSError):
            os.chdir(folder)
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        environment = merge_environment(make_environment(pass_env), brought, pass_env)
        self._process = WorkerProcess(environment, self._selector, None)
        self._early: dict[int, bytes] = {}
        self._is_closing = self._has_ended = False

    def find_pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    def send(self, offset: int, line: bytes) -> None:
        """Queue a message.

        Args:
          offset: bytes of all messages before it; calls may overtake each other on their way.
          line: the encoded message.
        """
        with self._lock:
            self._early[offset] = line
            while not self._is_closing and self._process.queued_bytes in self._early:
                self._process.send_bytes(self._early.pop(self._process.queued_bytes))

    def receive(self) -> tuple[bytes, bool]:
        """Wait for what the process writes, and meanwhile move what was queued for it.

        Returns:
          The bytes, and whether the process has ended.
        """
        while True:
            events = self._selector.select(LOOK_SECONDS)
            with self._lock:
                if self._has_ended:
                    return b"", True
                chunk, closed = self._move({key.fd: mask for key, mask in events})
                if not events and not self._process.is_alive():
                    # A child that an environment left behind may hold the pipe open.
                    chunk, closed = self._process.read_bytes()[0], True
            if chunk or closed:
                return chunk, closed

    def hang_up(self) -> None:
        """Close the process' input."""
        with self._lock:
            self._is_closing = True
            self._process.hang_up()

    def stop(self, grace: float, first_signal: int | None, thread: int | None) -> tuple[str, int]:
        """End the process; return how it ended and how many bytes it had consumed."""
        with self._lock:
            self._is_closing = self._has_ended = True
            how = self._process.stop(grace, first_signal, thread)
            return how, self._process.consumed_bytes

    def _move(self, ready: Mapping[int, int]) -> tuple[bytes, bool]:
        """Move bytes where that is possible."""
        watched = self._selector.get_map()  # another thread may have ended the watch since the events
        if ready.get(self._process.stdin, 0) & selectors.EVENT_WRITE and self._process.stdin in watched:
            self._process.write()
        if ready.get(self._process.stdout, 0) & selectors.EVENT_READ and self._process.stdout in watched:
            return self._process.read_bytes()
        return b"", False
