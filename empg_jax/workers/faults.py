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
    """Takes an event: its name, and what there is to say of it."""

    def __call__(self, event: str, /, **fields: Any) -> None:
        """Note one event."""


def tell_nobody(event: str, /, **fields: Any) -> None:
    """Take an event where nobody keeps a diary."""


class PoolError(RunError):
    """The pool cannot go on: workers do not start, or most episodes fail."""


@dataclasses.dataclass(frozen=True, slots=True)
class EnvFailure:
    """Why an episode was lost. Never the policy's doing, hence never a reward of zero.

    Attributes:
      reason: ``env_error`` (the environment raised), ``env_garbage`` (it answered with something that
        the protocol forbids), ``timeout``, ``worker_died``, ``nondeterministic`` (a replay in a new
        worker gave another observation), ``quarantined`` (the task failed too often; not tried).
      detail: text for a person: message, traceback, exit code, last lines of stderr.
    """

    reason: Reason
    detail: str


@dataclasses.dataclass(frozen=True)
class PoolTimeouts:
    """Seconds allowed for a worker's start, a reset and a step."""

    start: float = 30.0
    reset: float = 30.0
    step: float = 10.0


@dataclasses.dataclass(frozen=True)
class FaultPolicy:
    """When the pool stops trying.

    Attributes:
      quarantine_after: failures in a row after which a task is not tried any more.
      breaker_window: the last so many episodes are looked at.
      breaker_share: share of them that must have failed to stop the pool.
      breaker_min: failures below which the pool is never stopped.
      start_attempts: times in a row that a worker may fail to start.
      backoff: seconds before the second start in a row that led to nothing; doubles each time.
      backoff_max: upper bound of that wait.
    """

    quarantine_after: int = 3
    breaker_window: int = 64
    breaker_share: float = 0.5
    breaker_min: int = 20
    start_attempts: int = 3
    backoff: float = 0.1
    backoff_max: float = 5.0

    def wait_before_start(self, barren: int) -> float:
        """Seconds to wait before a start, after ``barren`` starts in a row that led to no reply."""
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
    """Remembers how episodes ended: which tasks to leave alone, and when to stop altogether."""

    def __init__(self, policy: FaultPolicy, tell: Tell = tell_nobody):
        """Start with a clean record; ``tell`` hears of tasks that are given up."""
        self._policy, self._tell = policy, tell
        self._in_a_row: collections.Counter[tuple[str, int]] = collections.Counter()
        self._window: collections.deque[str] = collections.deque(maxlen=policy.breaker_window)
        self._last: dict[str, str] = {}

    def is_quarantined(self, split: str, index: int) -> bool:
        """True for a task whose last ``quarantine_after`` episodes all failed."""
        return self._in_a_row[split, index] >= self._policy.quarantine_after

    def quarantined(self) -> list[tuple[str, int]]:
        """The tasks that are left alone, sorted."""
        return sorted(task for task in self._in_a_row if self.is_quarantined(*task))

    def record_success(self, split: str, index: int) -> None:
        """An episode was released alive."""
        self._window.append("")
        self._in_a_row.pop((split, index), None)

    def record_failure(self, split: str, index: int, failure: EnvFailure) -> None:
        """An episode was lost."""
        self._window.append(failure.reason)
        self._last[failure.reason] = failure.detail
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
        """Stops a pool in which most episodes fail.

        Raises:
          PoolError: with the counts by reason and the last message of each.
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
