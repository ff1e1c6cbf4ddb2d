"""Faults of environments: their reasons, their counts, and the limits beyond which a pool gives up."""

from __future__ import annotations

import collections
import dataclasses
import logging
from typing import Any, Literal, Protocol

from empg_jax.errors import RunError

logger = logging.getLogger(__name__)

Reason = Literal["env_error", "env_garbage", "timeout", "worker_died", "nondeterministic", "quarantined"]


class Tell(Protocol):
    """A receiver of events, each with a name and fields."""

    def __call__(self, event: str, /, **fields: Any) -> None:
        """Record one event."""


def tell_nobody(event: str, /, **fields: Any) -> None:
    """Ignore an event, where no event log is kept."""


class PoolError(RunError):
    """The pool cannot continue: workers do not start, or most episodes fail."""


@dataclasses.dataclass(frozen=True, slots=True)
class EnvFailure:
    """The cause of a lost episode. The policy is never the cause, so the episode is not scored zero.

    Attributes:
      reason: ``env_error`` (the environment raised), ``env_garbage`` (its answer breaks the protocol),
        ``timeout``, ``worker_died``, ``nondeterministic`` (a replay in a new worker gave another
        observation), ``quarantined`` (the task failed too often and was not tried).
      detail: text for the user: message, traceback, exit code, last lines of stderr.
    """

    reason: Reason
    detail: str


@dataclasses.dataclass(frozen=True)
class PoolTimeouts:
    """The seconds allowed for a worker's start, a reset and a step."""

    start: float = 30.0
    reset: float = 30.0
    step: float = 10.0


@dataclasses.dataclass(frozen=True)
class FaultPolicy:
    """The limits at which the pool gives up on a task, on a worker, or altogether.

    Attributes:
      quarantine_after: consecutive failures after which a task is not tried any more.
      breaker_window: number of latest episodes that the breaker considers.
      breaker_share: share of failed episodes among these at which the pool stops.
      breaker_min: number of failures below which the pool never stops.
      start_attempts: consecutive failed starts of a worker at which the pool stops.
      backoff: seconds to wait after one start without any reply; doubles with each further one.
      backoff_max: upper bound of that wait, in seconds.
    """

    quarantine_after: int = 3
    breaker_window: int = 64
    breaker_share: float = 0.5
    breaker_min: int = 20
    start_attempts: int = 3
    backoff: float = 0.1
    backoff_max: float = 5.0

    def wait_before_start(self, barren: int) -> float:
        """Return the seconds to wait before a start, after ``barren`` consecutive starts without a reply."""
        return min(self.backoff_max, self.backoff * 2.0 ** (barren - 1)) if barren else 0.0


@dataclasses.dataclass
class PoolStats:
    """Counts since the pool was opened.

    Attributes:
      commands, replies: resets and steps asked for, and answers given (failures included).
      starts: worker processes started.
      restarts: workers replaced after a death or a hang.
      recycled: workers replaced because of their memory.
      replayed: commands repeated in new workers.
      recovered: episodes that went on in a new worker.
      failures: lost episodes by reason.
    """

    commands: int = 0
    replies: int = 0
    starts: int = 0
    restarts: int = 0
    recycled: int = 0
    replayed: int = 0
    recovered: int = 0
    failures: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, for the output of benchmarks."""
        return {**vars(self), "failures": dict(self.failures)}


class FaultLedger:
    """The record of failed episodes, which decides on quarantine of tasks and on stopping the pool."""

    def __init__(self, policy: FaultPolicy, tell: Tell = tell_nobody):
        """Start with an empty record; ``tell`` receives an event for each task that is quarantined."""
        self._policy, self._tell = policy, tell
        self._in_a_row: collections.Counter[tuple[str, int]] = collections.Counter()
        self._window: collections.deque[str] = collections.deque(maxlen=policy.breaker_window)
        self._last: dict[str, str] = {}

    def is_quarantined(self, split: str, index: int) -> bool:
        """Return whether the last ``quarantine_after`` episodes of a task all failed."""
        return self._in_a_row[split, index] >= self._policy.quarantine_after

    def quarantined(self) -> list[tuple[str, int]]:
        """List the quarantined tasks, sorted."""
        return sorted(task for task in self._in_a_row if self.is_quarantined(*task))

    def record_success(self, split: str, index: int) -> None:
        """Record an episode that was released without a failure."""
        self._window.append("")
        self._in_a_row.pop((split, index), None)

    def record_failure(self, split: str, index: int, failure: EnvFailure) -> None:
        """Record a lost episode."""
        self._window.append(failure.reason)
        self._last[failure.reason] = failure.detail
        # A refusal is no new failure of the task: counting it would prove the quarantine by itself.
        if failure.reason == "quarantined":
            return
        self._in_a_row[split, index] += 1
        if self._in_a_row[split, index] == self._policy.quarantine_after:
            logger.warning(
                "task %s/%d is quarantined after %d failures in a row; the last: %s: %s",
                *(split, index, self._policy.quarantine_after, failure.reason, failure.detail),
            )
            self._tell("task_quarantined", split=split, task=index, reason=failure.reason)

    def check(self) -> None:
        """Stop a pool in which most episodes fail.

        Raises:
          PoolError: too many episodes failed; the message holds counts and the last detail by reason.
        """
        policy = self._policy
        counts = collections.Counter(reason for reason in self._window if reason)
        failed = counts.total()
        if failed < policy.breaker_min or failed < policy.breaker_share * len(self._window):
            return
        table = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
        last = "\n".join(f"last {reason}: {self._last[reason]}" for reason in counts)
        raise PoolError(
            f"{failed} of the last {len(self._window)} episodes failed in their environment ({table}); "
            f"the pool stops at {policy.breaker_share:.0%}.\n{last}"
        )
