"""What a supervisor needs of a worker process, wherever it runs."""

from __future__ import annotations

import selectors
from collections.abc import Sequence
from typing import Any, Protocol


class Process(Protocol):
    """A worker process, with non-blocking transfer of whole messages.

    Attributes:
      was_blocked: whether the last `read` found so much that the worker may have waited for room.
      queued_bytes: bytes given to `send` so far.
      consumed_bytes: of these, read by the worker; known after `stop`. Of a worker about which nothing is
        known any more (its machine is gone), none, so that no command is blamed.
    """

    was_blocked: bool
    queued_bytes: int
    consumed_bytes: int

    @property
    def pid(self) -> int | None:
        """Process id on its own machine; None until that is known."""

    def send(self, message: Any) -> None:
        """Queue one message."""

    def write(self) -> bool:
        """Move queued bytes after the selector reported room; return whether any were moved."""

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the complete messages that have arrived, and whether the worker has closed its end."""

    def is_alive(self) -> bool:
        """Return False once the process has ended."""

    def hang_up(self) -> None:
        """Close the worker's input; an idle worker then closes its environments and exits."""

    def stop(self, grace: float, first_signal: int | None = None, thread: int | None = None) -> str:
        """End the process and every process that it started.

        Args:
          grace: seconds in which it may end by itself (it has died or was hung up), before it is killed.
          first_signal: a signal to send at once; SIGABRT makes a hanging worker write its stacks.
          thread: number of the thread whose stack is of interest.

        Returns:
          A description of how it ended, with that stack or the last lines of its stderr.
        """


class Start(Protocol):
    """A function that starts one worker process."""

    def __call__(self, pass_env: Sequence[str], selector: selectors.BaseSelector, owner: Any) -> Process:
        """Start a process.

        Args:
          pass_env: names of further environment variables that it gets.
          selector: reports when `Process.read` or `Process.write` has something to do, until it is stopped.
          owner: the selector's data for them.
        """
