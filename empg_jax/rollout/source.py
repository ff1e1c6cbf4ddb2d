"""The source of training trajectories: order of tasks, admission, refill, and release by groups.

Dynamic sampling (DAPO, https://arxiv.org/abs/2503.14476) is implemented here, not in the algorithms. A group
whose attempts all have the same return has no group-relative advantage, so another group takes its place.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from empg_jax.rollout.buffer import ReplayBuffer
from empg_jax.rollout.collector import Collector
from empg_jax.rollout.episode import Attempt, tell_discarded
from empg_jax.types import Outcome, Status, Trajectory
from empg_jax.workers.faults import Tell, tell_nobody

MAX_RETRIES = 3  # attempts of one member before its task counts as broken
# Returns that differ by less count as equal: sums of the same rewards in another order round differently.
SAME_RETURN = 1e-6


@dataclasses.dataclass(frozen=True)
class TaskOrder:
    """The task of each group: a pure function, with a new permutation for every pass over the panel."""

    split: str
    num_tasks: int
    seed: int

    def task_of(self, group_id: int) -> int:
        """Return the index in the panel of the group's task."""
        epoch, position = divmod(group_id, self.num_tasks)
        return int(_permutation(self.seed, epoch, self.num_tasks)[position])


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def is_uniform(group: Sequence[Trajectory]) -> bool:
    """Return whether all attempts of a group have the same raw return, as ``mixed_groups`` does."""
    returns = [trajectory.episode_return for trajectory in group]
    return max(returns) - min(returns) < SAME_RETURN


@dataclasses.dataclass(frozen=True)
class GroupFilter:
    """The limit of dynamic sampling, which replaces groups of equal returns.

    Attributes:
      max_refills: limit on replaced groups before each update, in batches; beyond it, groups of equal returns
        are trained on.
    """

    max_refills: int


class Interrupted(Exception):  # a request, not an error
    """A request to stop that arrived while episodes were collected."""


class GroupSource:
    """The source of training groups: it admits them, refills discarded attempts, and releases them in order.

    At most ``(max_lag + 1) * groups_per_batch`` groups are admitted and not yet released. So only stragglers
    can be older than ``max_lag`` when they are released, and the buffer drops their groups.

    Args:
      collector: runs the attempts.
      buffer: holds finished attempts.
      order: the task of each group.
      groups_per_batch: groups that one update consumes.
      min_group_size: attempts that suffice to close a group once ``group_timeout`` is over; None: all.
      group_timeout: seconds from a group's admission to its deadline.
      group_filter: limit of dynamic sampling; None switches it off.
      tell: receives an event for each discarded episode and each replaced group.

    Attributes:
      outcomes: episodes that ended since the start of the run, by ``status:reason``.
      failed_groups: groups given up because of a broken task, since construction.
      metrics: metrics of the batch that was released last; empty without a filter.
    """

    def __init__(
        self,
        collector: Collector,
        buffer: ReplayBuffer,
        order: TaskOrder,
        *,
        groups_per_batch: int,
        min_group_size: int | None = None,
        group_timeout: float = 300.0,
        group_filter: GroupFilter | None = None,
        tell: Tell = tell_nobody,
    ) -> None:
        self.collector, self.buffer, self.order = collector, buffer, order
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.failed_groups = 0
        self.metrics: dict[str, float] = {}
        self._groups_per_batch = groups_per_batch
        self._min_group_size, self._group_timeout = min_group_size, group_timeout
        self._filter, self._tell = group_filter, tell
        self._replaced = 0  # groups since the last batch
        self._next_group = 0
        self._open: dict[int, set[int]] = {}  # group -> members that are still to come
        self._deadlines: dict[int, float] = {}

    def collect(self, version: int, should_stop: Callable[[], bool]) -> list[Trajectory]:
        """Run episodes until a batch of groups is complete; returns it sorted by (group, member).

        Args:
          version: the policy version that is about to be trained.
          should_stop: called in every round; True interrupts the collection.

        Raises:
          Interrupted: ``should_stop`` returned True; attempts in flight stay admitted.
        """
        while True:
            for group_id in self.buffer.drop_stale(version):
                self.collector.cancel(group_id)
                self._replace(group_id, "stale")
            self._admit()
            batch = self.buffer.release(self._groups_per_batch)
            if batch is not None:
                for trajectory in batch:
                    self._forget(trajectory.group_id)
                self._describe(batch)
                return batch
            if should_stop():
                raise Interrupted
            for attempt, trajectory in self.collector.advance():
                self._finish(attempt, trajectory)
            self._close_late_groups()

    def _admit(self) -> None:
        limit = (self.buffer.max_lag + 1) * self._groups_per_batch
        while len(self._open) < limit:
            self._admit_group(self._next_group, range(self.buffer.group_size))
            self._next_group += 1

    def _admit_group(self, group_id: int, members: Any) -> None:
        task = self.order.task_of(group_id)
        self._open[group_id] = set(members)
        self._deadlines[group_id] = time.monotonic() + self._group_timeout
        self.collector.admit(Attempt(self.order.split, task, group_id, member) for member in members)

    def _finish(self, attempt: Attempt, trajectory: Trajectory) -> None:
        self.outcomes[f"{trajectory.outcome.status}:{trajectory.outcome.reason}"] += 1
        if not trajectory.outcome.is_trained:
            tell_discarded(self._tell, attempt, trajectory.outcome)
        if attempt.group_id not in self._open:  # its group was given up or closed meanwhile
            return
        if trajectory.outcome.is_trained:
            self._open[attempt.group_id].discard(attempt.member)
            self.buffer.add(trajectory)
            if not self._open[attempt.group_id]:
                self._replace_uniform(attempt.group_id)
        elif trajectory.outcome.reason == "outage" or (
            attempt.retry + 1 < MAX_RETRIES and trajectory.outcome.reason != "quarantined"
        ):
            # Not for a quarantined task: the pool refuses it at once, every time. An outage says nothing of a
            # task; the pool holds the next attempt until it is over.
            self.buffer.stats.refilled += 1
            self.collector.admit([dataclasses.replace(attempt, retry=attempt.retry + 1)])
        else:  # the task itself is broken: another group takes its place
            self.failed_groups += 1
            self.collector.cancel(attempt.group_id)
            self._replace(attempt.group_id, "failed")

    def _close_late_groups(self) -> None:
        if self._min_group_size is None:
            return
        now = time.monotonic()
        for group_id, missing in list(self._open.items()):
            present = self.buffer.group_size - len(missing)
            if missing and now > self._deadlines[group_id] and present >= self._min_group_size:
                for attempt in self.collector.cancel(group_id):
                    self.outcomes["discarded:group_closed"] += 1
                    tell_discarded(self._tell, attempt, Outcome(Status.DISCARDED, "group_closed"))
                missing.clear()
                self.buffer.close_group(group_id)
                self._replace_uniform(group_id)

    def _replace_uniform(self, group_id: int) -> None:
        """Drop a complete group whose returns are all equal, so that another one is admitted."""
        if self._filter is None or self._replaced >= self._filter.max_refills * self._groups_per_batch:
            return
        if is_uniform(self.buffer.members(group_id)):
            self._replaced += 1
            self._replace(group_id, "uniform")

    def _replace(self, group_id: int, reason: str) -> None:
        """Give up a group; the next admission puts another one in its place."""
        task = self.order.task_of(group_id)
        self._tell("group_replaced", reason=reason, group_id=group_id, split=self.order.split, task=task)
        self.buffer.forget(group_id)
        self._forget(group_id)

    def _describe(self, batch: list[Trajectory]) -> None:
        """Set the metrics of a batch that is released, and reset the count of replaced groups."""
        if self._filter is None:
            return
        groups = [list(group) for _, group in itertools.groupby(batch, key=lambda t: t.group_id)]
        uniform = sum(is_uniform(group) for group in groups)
        self.metrics = {"groups_replaced": float(self._replaced), "groups_uniform": float(uniform)}
        self._replaced = 0

    def _forget(self, group_id: int) -> None:
        self._open.pop(group_id, None)
        self._deadlines.pop(group_id, None)

    # ------------------------------------------------------------------------------------- resume

    def snapshot(self) -> dict[str, Any]:
        """Return the progress as JSON types; on resume, unfinished attempts start again."""
        return {
            "next_group": self._next_group,
            "replaced": self._replaced,
            "open": [[group_id, sorted(missing)] for group_id, missing in sorted(self._open.items())],
            "outcomes": dict(self.outcomes),
        }

    def restore(self, snapshot: dict[str, Any], held: list[Trajectory]) -> None:
        """Go on from a `snapshot` and the buffer's contents at that moment."""
        self._next_group, self._replaced = snapshot["next_group"], snapshot["replaced"]
        self.outcomes = collections.Counter(snapshot["outcomes"])
        self.buffer.restore(held)
        for group_id, missing in snapshot["open"]:
            # Finished members come from the buffer; only the missing ones are attempted again.
            self._admit_group(group_id, missing)
            if not missing:
                self.buffer.close_group(group_id)
