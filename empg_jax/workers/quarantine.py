"""The quarantine: tasks that keep failing while others succeed are left alone for a while."""

from __future__ import annotations

import collections
import logging
from typing import Any

from empg_jax.workers.faults import EnvFailure, FaultPolicy, Tell, tell_nobody

logger = logging.getLogger(__name__)

Task = tuple[str, int]


class Quarantine:
    """The record of failed tasks.

    A failure counts against its task once an episode of another one has succeeded after it. Until then it may
    have a cause that all share, and an outage must not fill the quarantine. Time is counted in episodes that
    ended, so that a resumed run releases a task exactly where the uninterrupted one does.
    """

    def __init__(self, policy: FaultPolicy, tell: Tell = tell_nobody):
        """Start with an empty record; ``tell`` receives an event for each task that goes in or comes out."""
        self._policy, self._tell = policy, tell
        self._ended = 0
        self._in_a_row: collections.Counter[Task] = collections.Counter()
        self._open: list[tuple[Task, str]] = []  # failures without a success after them
        self._until: dict[Task, int] = {}  # quarantined task -> number of ended episodes at its release

    def holds(self, split: str, index: int) -> bool:
        """Return whether a task must not be tried now."""
        return (split, index) in self._until

    def tasks(self) -> list[Task]:
        """List the quarantined tasks, sorted."""
        return sorted(self._until)

    def record_success(self, split: str, index: int) -> None:
        """Record an episode that ended without a failure: all earlier failures of others now count."""
        task = (split, index)
        self.record_end()
        self._in_a_row.pop(task, None)
        failures, self._open = self._open, []
        for failed, cause in failures:
            if failed != task:
                self._count(failed, cause)

    def record_refusal(self, split: str, index: int, cause: str) -> None:
        """Record an episode whose task cannot be played, whatever is tried: it is quarantined at once."""
        self.record_end()
        self._put((split, index), cause)

    def record_failure(self, split: str, index: int, failure: EnvFailure) -> None:
        """Record a lost episode that had no common cause so far."""
        self._open.append(((split, index), f"{failure.reason}: {failure.detail}"))
        self.record_end()

    def record_end(self) -> None:
        """Record an episode that ended and says nothing about its task, such as a refusal."""
        self._ended += 1
        for task in [task for task, end in self._until.items() if self._ended >= end]:
            del self._until[task]
            # One more failure, and it goes back.
            self._in_a_row[task] = self._policy.quarantine_after - 1
            self._tell("task_released", split=task[0], task=task[1])

    def forget_open(self) -> None:
        """Drop the failures that nobody's success has confirmed: they had a common cause."""
        self._open.clear()

    def snapshot(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            "ended": self._ended,
            "in_a_row": [[*task, count] for task, count in sorted(self._in_a_row.items())],
            "open": [[*task, cause] for task, cause in self._open],
            "until": [[*task, end] for task, end in sorted(self._until.items())],
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go on from a `snapshot`."""
        self._ended = snapshot["ended"]
        self._in_a_row = collections.Counter(
            {(split, index): count for split, index, count in snapshot["in_a_row"]}
        )
        self._open = [((split, index), cause) for split, index, cause in snapshot["open"]]
        self._until = {(split, index): end for split, index, end in snapshot["until"]}

    def _count(self, task: Task, cause: str) -> None:
        self._in_a_row[task] += 1
        if self._in_a_row[task] >= self._policy.quarantine_after:
            self._put(task, cause, f" after {self._policy.quarantine_after} failures in a row; the last")

    def _put(self, task: Task, cause: str, after: str = "") -> None:
        if task in self._until:
            return
        self._until[task] = self._ended + self._policy.quarantine_episodes
        logger.warning("task %s/%d is quarantined%s: %s", *task, after, cause)
        reason = cause.partition(":")[0]
        self._tell("task_quarantined", split=task[0], task=task[1], reason=reason)
