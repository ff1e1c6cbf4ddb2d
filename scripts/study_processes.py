"""Child processes that a stop reaches: each is waited for, and what it cost is known."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Ended:
    """The end of a child.

    Attributes:
      code: exit code; negative after a signal.
      output: what it wrote to stdout.
      wall: wall seconds.
      cpu: CPU seconds, with those of its own children.
    """

    code: int
    output: str
    wall: float
    cpu: float


class Children:
    """The children of this process, in any number of threads.

    Attributes:
      is_stopping: no child is started any more.
    """

    def __init__(self) -> None:
        self.is_stopping = False
        self._lock = threading.Lock()
        self._live: set[int] = set()

    def run(self, command: Sequence[str], log: Path, *, keep: int) -> Ended | None:
        """Run a command to its end.

        Args:
          command: program and arguments.
          log: file that stderr is appended to.
          keep: descriptor that the child inherits: a claim that outlives this process.

        Returns:
          How it ended; None if it was not started because of a stop.
        """
        output = log.with_suffix(".out")
        with log.open("ab") as errors, output.open("wb") as out:
            with self._lock:
                if self.is_stopping:
                    return None
                began = time.monotonic()
                # A session of its own: a Ctrl-C in the terminal reaches it once, through `stop`.
                child = subprocess.Popen(
                    command, stdout=out, stderr=errors, start_new_session=True, pass_fds=(keep,)
                )
                self._live.add(child.pid)
            # It stays a zombie until it is out of the set, so its number is never another process's.
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            with self._lock:
                self._live.discard(child.pid)
                _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        text = output.read_text(encoding="utf-8", errors="replace")
        output.unlink()
        cpu = usage.ru_utime + usage.ru_stime
        return Ended(child.returncode, text, time.monotonic() - began, cpu)

    def stop(self) -> None:
        """Start no child any more and ask the live ones to stop; asked again, they end at once."""
        with self._lock:
            self.is_stopping = True
            for pid in self._live:
                os.kill(pid, signal.SIGTERM)
