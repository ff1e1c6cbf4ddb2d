"""The breaker: when most episodes fail, the cause is a common one, and new episodes wait until it is gone."""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Callable, Hashable

from empg_jax.workers.faults import FaultPolicy, PoolError, Tell, tell_nobody

logger = logging.getLogger(__name__)

STARTS = "failed_starts"  # reason of workers that do not start
# One task that is broken fails as often in a row as its group has members, so one alone is no common cause.
MIN_TASKS = 2


class Breaker:
    """The decision to pause, to probe, to go on and to give up; it sends nothing itself.

    It opens when ``breaker_min`` resets, or steps, of several tasks fail and none succeeds between them, or
    when a share of the latest episodes has failed. It closes when a probe succeeds, or when as many commands
    that were under way succeed in a row.

    Attributes:
      openings: how often it opened.
    """

    def __init__(
        self,
        policy: FaultPolicy,
        tell: Tell = tell_nobody,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Start closed; ``tell`` receives ``breaker_open`` and ``breaker_closed``."""
        self.openings = 0
        self._policy, self._tell, self._clock = policy, tell, clock
        self._window: collections.deque[tuple[str, Hashable]] = collections.deque(
            maxlen=policy.breaker_window
        )
        self._last: dict[str, str] = {}
        # By operation, the tasks of the failures since the last success. Resets are no evidence about steps.
        self._runs: dict[str, list[Hashable]] = {"reset": [], "step": []}
        self._op = "step"  # of the failure that opened it
        self._works = 0  # successes of this operation in a row, while open
        self._opened: float | None = None
        self._since = 0.0  # start of the outage; a short recovery does not end it
        self._is_proven = True  # enough episodes have succeeded since it closed
        self._successes = 0
        self._probe_at = 0.0
        self._seconds = 0.0

    @property
    def is_open(self) -> bool:
        """Whether no new episode may start."""
        return self._opened is not None

    @property
    def seconds(self) -> float:
        """Seconds that it was open, altogether."""
        return self._seconds + (0.0 if self._opened is None else self._clock() - self._opened)

    @property
    def probe_at(self) -> float:
        """Time of the next probe; infinite while closed."""
        return float("inf") if self._opened is None else self._probe_at

    def record_answer(self, op: str) -> None:
        """Record a reset or step that the environment has answered."""
        if self._runs[op]:
            self._runs[op].clear()
        if self._opened is not None and op == self._op:
            self._works += 1

    @property
    def is_disproved(self) -> bool:
        """Whether it is open although the environment works."""
        return self._opened is not None and self._works >= self._policy.breaker_min

    def record_success(self) -> None:
        """Record an episode that ended without a failure."""
        self._window.append(("", None))
        self._successes += 1
        if self._successes >= self._policy.breaker_min:
            self._is_proven = True

    def record_failure(self, reason: str, detail: str, op: str = "", *, task: Hashable) -> None:
        """Record one incident: a lost episode, or a lost worker whatever it carried (no op)."""
        self._works = 0
        if self._opened is not None:
            return
        self._window.append((reason, task))
        self._last[reason] = detail
        run = self._runs.get(op, [])
        run.append(task)
        failed = [task for reason, task in self._window if reason]
        is_most = len(failed) >= self._policy.breaker_share * len(self._window)
        if self._is_common(run) or (is_most and self._is_common(failed)):
            self._op = op or self._op
            self.open()

    def fail_start(self, detail: str) -> None:
        """Record that a worker of a pool that has been ready does not start any more."""
        self._window.append((STARTS, None))
        self._last[STARTS] = detail
        self.open()

    def open(self) -> None:
        """Pause; the first probe is due at once, so that mere bad luck costs no time."""
        if self._opened is not None:
            return
        now = self._clock()
        self._opened = self._probe_at = now
        self._works = 0
        self.openings += 1
        if self._is_proven:
            self._since = now
        counts = self._counts()
        reason, _ = counts.most_common(1)[0]
        last = self._last[reason].strip().rpartition("\n")[2]
        logger.warning(
            "%s: no new episodes until the environment works again; a probe every %g s, up to %g s. "
            "The last one: %s",
            *(self._describe(), self._policy.probe, self._policy.patience, last or "no message"),
        )
        self._tell("breaker_open", reasons=dict(counts), reason=reason, detail=self._last[reason])

    def take_probe(self) -> bool:
        """Return whether a probe is due now; the next one is due ``probe`` seconds later."""
        if self._opened is None or self._clock() < self._probe_at:
            return False
        self._probe_at = self._clock() + self._policy.probe
        return True

    def close(self) -> None:
        """Go on, because a probe succeeded."""
        if self._opened is None:
            return
        seconds = self._clock() - self._opened
        self._seconds += seconds
        self._opened = None
        self._window.clear()
        self._successes = 0
        for run in self._runs.values():
            run.clear()
        self._is_proven = False
        logger.warning("the environment works again after %.1f s", seconds)
        self._tell("breaker_closed", seconds=round(seconds, 3))

    def check(self) -> None:
        """Stop a pool whose environment stays away.

        Raises:
          PoolError: the outage lasts longer than ``patience``; the message holds counts and the last detail
            by reason.
        """
        if self._opened is None or self._clock() < self._since + self._policy.patience:
            return
        last = "\n".join(f"last {reason}: {self._last[reason]}" for reason in self._counts())
        raise PoolError(
            f"{self._describe()}; the pool stops after {self._policy.patience:g} s (faults.patience)"
            f" without a success.\n{last}"
        )

    def _is_common(self, failed: list[Hashable]) -> bool:
        """Return whether these tasks' failures are many enough, and of several."""
        least = self._policy.breaker_min
        return len(failed) >= least and len(set(failed)) >= min(least, MIN_TASKS)

    def _counts(self) -> collections.Counter[str]:
        return collections.Counter(reason for reason, _ in self._window if reason)

    def _describe(self) -> str:
        counts = self._counts()
        table = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
        return (
            f"{counts.total()} of the last {len(self._window)} episodes failed in their environment ({table})"
        )
