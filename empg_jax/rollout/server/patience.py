"""How long a server may fail: the waits between attempts, and the end of a run's patience."""

from __future__ import annotations

import time
from collections.abc import Callable

from empg_jax.rollout.server.answers import SamplerError


class Patience:
    """The clock of an outage, which begins with the first failure after a success.

    Args:
      seconds: longest outage.
      backoff: wait before the second attempt; it doubles with every further one.
      backoff_max: longest wait.
      timer: a monotonic clock, in seconds.
    """

    def __init__(
        self,
        seconds: float,
        *,
        backoff: float,
        backoff_max: float,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds, self._backoff, self._backoff_max, self._timer = seconds, backoff, backoff_max, timer
        self._since: float | None = None

    def succeed(self) -> None:
        """Note that the server did what it was asked."""
        self._since = None

    def fail(self, reason: str) -> None:
        """Note a failure.

        Raises:
          SamplerError: nothing has succeeded for too long.
        """
        now = self._timer()
        if self._since is None:
            self._since = now
        elif now - self._since > self._seconds:
            raise SamplerError(
                f"nothing was sampled for {now - self._since:.0f} s (faults.patience={self._seconds:g}); the "
                f"last failure: {reason}"
            )

    def wait(self, failures: int) -> float:
        """Return the seconds to wait after so many failures of one request in a row."""
        return min(self._backoff_max, self._backoff * 2.0 ** min(failures - 1, 30))
