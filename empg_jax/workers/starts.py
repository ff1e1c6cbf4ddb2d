"""When a worker's process is started again, and when that is given up."""

from __future__ import annotations

import time
from collections.abc import Callable

from empg_jax.workers.faults import FaultPolicy


class Starts:
    """The count of a worker's starts that led to nothing, and the waits between them.

    Attributes:
      at: time of the next start, where there is no process.
      failed: starts in a row that did not become ready.
    """

    def __init__(self, policy: FaultPolicy, clock: Callable[[], float] = time.monotonic):
        """Begin with a start that is due at once."""
        self.at = 0.0
        self.failed = 0
        self._policy, self._clock = policy, clock
        self._barren = 0  # consecutive starts without any answer to a command
        self._since = 0.0

    @property
    def is_failing(self) -> bool:
        """Whether too many starts in a row have failed."""
        return self.failed >= self._policy.start_attempts

    @property
    def is_hopeless(self) -> bool:
        """Whether they have failed for longer than ``patience``."""
        return self.is_failing and self._clock() >= self._since + self._policy.patience

    def fail(self) -> None:
        """Count a process that did not become ready."""
        if not self.failed:
            self._since = self._clock()
        self.failed += 1
        self._barren += 1
        self.at = self._clock() + self._policy.wait_before_start(self._barren)

    def lose(self) -> None:
        """Count a process that was ready and died."""
        self.at = self._clock() + self._policy.wait_before_start(self._barren)
        self._barren += 1

    def succeed(self) -> None:
        """Note that the process is ready."""
        self.failed = 0

    def bear(self) -> None:
        """Note that the process has answered a command."""
        self._barren = 0
