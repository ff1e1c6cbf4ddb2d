"""How long a server may fail: the waits between attempts, and the end of a run's patience."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from empg_jax.rollout.server.answers import SamplerError
from empg_jax.workers.faults import Tell, tell_nobody


class Patience:
    """The clock of an outage, which begins with the first failure after a success.

    It stands while nothing is asked of the server, as during the learner's update.

    Args:
      seconds: longest outage.
      backoff: wait before the second attempt; it doubles with every further one.
      backoff_max: longest wait.
      tell: receives ``sampler_failing`` when an outage begins, and ``sampler_answers`` when it is over.
      timer: a monotonic clock, in seconds.
    """

    def __init__(
        self,
        seconds: float,
        *,
        backoff: float,
        backoff_max: float,
        tell: Tell = tell_nobody,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds, self._backoff, self._backoff_max = seconds, backoff, backoff_max
        self._tell, self._timer = tell, timer
        self._since: float | None = None
        self._first = ""  # reason of the outage: later ones may only be its consequences
        self._open, self._stopped = 0, 0.0  # what is being asked; when nothing was any more

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Let the clock run while something is asked of the server; several may be at one time."""
        if not self._open and self._since is not None:
            self._since += self._timer() - self._stopped
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            self._stopped = self._timer()

    def succeed(self) -> None:
        """Note that the server did what it was asked."""
        if self._since is not None:
            self._tell("sampler_answers", seconds=round(self._timer() - self._since, 3))
        self._since = None

    def fail(self, reason: str) -> None:
        """Note a failure.

        Raises:
          SamplerError: nothing has succeeded for too long.
        """
        now = self._timer()
        if self._since is None:
            self._since, self._first = now, reason
            self._tell("sampler_failing", detail=reason)
        elif now - self._since > self._seconds:
            first = "" if reason == self._first else f"the first failure: {self._first}; "
            raise SamplerError(
                f"nothing was sampled for {now - self._since:.0f} s (faults.patience={self._seconds:g}); "
                f"{first}the last failure: {reason}"
            )

    def wait(self, failures: int) -> float:
        """Return the seconds to wait after so many failures of one request in a row."""
        return min(self._backoff_max, self._backoff * 2.0 ** min(failures - 1, 30))
