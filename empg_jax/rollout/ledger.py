"""The ledger: every group of attempts from its admission to the update that consumes it, exactly once.

A group is OPEN while attempts are missing, READY when it may be trained on, RESERVED for one update, and
CONSUMED once the weights after that update exist. A group whose environment fails is REPLACED: its task gets
a new group. Nothing is dropped for its age or its length. The ledger is pure Python and reads no clock.

Two rules keep every sampled turn within ``max_lag`` updates of the weights that are trained on it:

* *Admission*: fewer than ``(max_lag + 1) * groups_per_update`` groups are admitted and not consumed.
* *Release*: oldest first. A younger group may overtake only while the older ones can still be consumed in
  time; otherwise the learner waits for them.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from empg_jax.rollout.episode import Attempt, tell_discarded
from empg_jax.rollout.order import Order
from empg_jax.types import Outcome, Status, Trajectory
from empg_jax.workers.faults import Tell, tell_nobody

MAX_RETRIES = 3  # attempts of one member before its group is replaced
# Reasons for which every further attempt at a task would fail, too.
HOPELESS = ("prompt_too_long", "quarantined")
MAX_LOSSES = 2  # groups of one task replaced in a row, before the task waits for the next pass over the panel
# Returns that differ by no more, relative to those above 1, count as equal, as in `algorithms.has_spread`:
# sums of the same rewards in another order round differently.
SAME_RETURN = 16 * 2.0**-23


def is_uniform(group: Sequence[Trajectory]) -> bool:
    """Return whether all attempts of a group have the same raw return, as ``mixed_groups`` does."""
    returns = [trajectory.episode_return for trajectory in group]
    low, high = min(returns), max(returns)
    return high - low <= SAME_RETURN * max(abs(low), abs(high), 1.0)


@dataclasses.dataclass
class Group:
    """One group that is admitted and not consumed.

    Attributes:
      version: policy version of the sampler when the group was admitted: no turn of it is older.
      missing: failures so far of each member that has not ended.
      done: the members that have ended, by number.
      seconds: what the failed attempts of each member took.
      update: the update that the group is reserved for; None before.
    """

    id: int
    task: int
    version: int
    missing: dict[int, int]
    done: dict[int, Trajectory] = dataclasses.field(default_factory=dict)
    seconds: dict[int, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    update: int | None = None

    @property
    def members(self) -> list[Trajectory]:
        """The trajectories that have arrived, sorted by member."""
        return [self.done[member] for member in sorted(self.done)]


@dataclasses.dataclass(frozen=True)
class Reserved:
    """The groups of one update, sorted by (group, member), with what is known of their selection."""

    update: int
    trajectories: list[Trajectory]
    metrics: dict[str, float]


class Ledger:
    """The groups of a run; see the module's docstring.

    Args:
      order: the choice of tasks; it hears of every complete group.
      group_size: attempts of each task.
      groups_per_update: groups that one update consumes.
      max_lag: largest age, in updates, of a turn that is trained on.
      updates: updates of the whole run: no group is admitted that none of them would consume.
      min_group_size: attempts that suffice to close a group once one of its members has taken
        ``group_timeout`` seconds, over all its attempts, without an end; None: all.
      group_timeout: that time.
      max_refills: limit of dynamic sampling (DAPO, https://arxiv.org/abs/2503.14476), which replaces groups
        of equal returns: batches replaced before each update, beyond which equal groups are trained on. None
        switches it off.
      tell: receives an event for each discarded episode and each replaced group.
      share: (index, number) of this host: it plays every ``number``-th place of the order, from ``index``,
        and numbers its groups likewise, so that no two hosts have one in common.

    Attributes:
      outcomes: episodes that ended since the start of the run, by ``status:reason``.
      counts: groups replaced because of failures, sampled tokens of no use, and steps of the environments in
        episodes that ended, since the start of the run.
      starts: attempts to start, in order; the caller empties it.
      cancels: groups whose attempts in flight are to be given up; the caller empties it.
    """

    def __init__(
        self,
        order: Order,
        *,
        group_size: int,
        groups_per_update: int,
        max_lag: int = 0,
        updates: int = 1 << 62,
        min_group_size: int | None = None,
        group_timeout: float = 300.0,
        max_refills: int | None = None,
        tell: Tell = tell_nobody,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        if group_size < 1 or groups_per_update < 1 or max_lag < 0:
            raise ValueError(
                f"group_size={group_size} and groups_per_update={groups_per_update} must be at least 1, "
                f"max_lag={max_lag} at least 0"
            )
        self.order, self.max_lag = order, max_lag
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.counts: collections.Counter[str] = collections.Counter()
        self.starts: list[Attempt] = []
        self.cancels: list[int] = []
        self._group_size, self._per_update, self._updates = group_size, groups_per_update, updates
        self._min_group_size, self._group_timeout = min_group_size, group_timeout
        self._max_refills, self._tell = max_refills, tell
        self._groups: dict[int, Group] = {}
        self._next_group = self._next_position = share[0]
        self._stride = share[1]
        self._taken: set[int] = set()  # places ahead that other hosts played before a resume
        self._again: collections.deque[int] = collections.deque()  # tasks whose group was replaced
        self._losses: collections.Counter[int] = collections.Counter()  # by task, in a row
        self._uniform = 0  # groups of equal returns replaced since the last reservation
        self._reserved = self._consumed = 0  # updates

    # -------------------------------------------------------------------------------- admission

    def admit(self, version: int) -> None:
        """Admit the groups for which there is capacity; their attempts go to `starts`.

        Args:
          version: the policy version that samples them.
        """
        ahead = min(self.max_lag + 1, self._updates - self._consumed)
        while len(self._groups) < ahead * self._per_update:
            if self._again:
                task = self._again.popleft()
            else:
                while self._next_position in self._taken:
                    self._taken.discard(self._next_position)
                    self._next_position += self._stride
                busy = {group.task for group in self._groups.values()}
                task = self.order.task_at(self._next_position, busy)
                self._next_position += self._stride
            missing = dict.fromkeys(range(self._group_size), 0)
            group = Group(self._next_group, task, version, missing)
            self._next_group += self._stride
            self._groups[group.id] = group
            self._start(group)

    def _start(self, group: Group) -> None:
        """Ask for the attempts that a group misses."""
        for member, retry in group.missing.items():
            self.starts.append(Attempt(self.order.split, group.task, group.id, member, retry))

    # --------------------------------------------------------------------------------- arrivals

    def finish(self, attempt: Attempt, trajectory: Trajectory, seconds: float = 0.0) -> None:
        """Take the end of an attempt: keep it, or start it again, or replace its group.

        Args:
          attempt: the attempt.
          trajectory: its episode.
          seconds: what it took, on the clock that ``group_timeout`` is for.
        """
        outcome, group = trajectory.outcome, self._groups.get(attempt.group_id)
        self.counts["environment_steps"] += len(trajectory.turns)
        if not outcome.is_trained or group is None or attempt.member not in group.missing:
            self.counts["tokens_wasted"] += trajectory.num_tokens
        if group is None or attempt.member not in group.missing:
            return  # it was counted when its group was replaced or closed
        self.outcomes[f"{outcome.status}:{outcome.reason}"] += 1
        if not outcome.is_trained:
            tell_discarded(self._tell, attempt, outcome)
        if outcome.is_trained:
            del group.missing[attempt.member]
            group.done[attempt.member] = trajectory
            if not group.missing:
                self._losses.pop(group.task, None)
                self._complete(group)
        elif outcome.reason == "outage":  # the pool holds the next attempt until it is over
            self.starts.append(attempt)
        elif group.missing[attempt.member] + 1 < MAX_RETRIES and outcome.reason not in HOPELESS:
            group.missing[attempt.member] += 1
            group.seconds[attempt.member] += seconds
            self.starts.append(dataclasses.replace(attempt, retry=attempt.retry + 1))
        else:
            del group.missing[attempt.member]
            self.counts["groups_failed"] += 1
            self._losses[group.task] += 1
            is_hopeless = outcome.reason in HOPELESS
            if is_hopeless or self._losses[group.task] >= MAX_LOSSES:
                del self._losses[group.task]
            else:
                self._again.append(group.task)
            if is_hopeless:  # drawn less from now on
                self.order.note(group.task, [False] * self._group_size)
            self._replace(group, outcome.reason if is_hopeless else "failed")

    def close_late(self, running: Mapping[Attempt, float]) -> None:
        """Close the groups that are past their time and have attempts enough.

        Args:
          running: seconds that the attempts in flight have taken so far; those that wait for a slot are not
            among them.
        """
        if self._min_group_size is None:
            return
        ages = {(attempt.group_id, attempt.member): seconds for attempt, seconds in running.items()}
        for group in list(self._groups.values()):
            is_late = any(
                group.seconds[member] + ages.get((group.id, member), 0.0) > self._group_timeout
                for member in group.missing
            )
            if is_late and len(group.done) >= self._min_group_size:
                self._give_up(group, "group_closed")
                self._complete(group)

    def forgive(self) -> None:
        """Forget the failures of attempts and tasks so far: they had a common cause."""
        for group in self._groups.values():
            group.missing = dict.fromkeys(group.missing, 0)
        self._losses.clear()

    def waste(self, tokens: int) -> None:
        """Count the sampled tokens of attempts that were given up in flight."""
        self.counts["tokens_wasted"] += tokens

    def _give_up(self, group: Group, reason: str) -> None:
        """Give up the attempts of a group that are in flight."""
        for member, retry in group.missing.items():
            self.outcomes[f"discarded:{reason}"] += 1
            attempt = Attempt(self.order.split, group.task, group.id, member, retry)
            tell_discarded(self._tell, attempt, Outcome(Status.DISCARDED, reason))
        group.missing.clear()
        self.starts = [attempt for attempt in self.starts if attempt.group_id != group.id]
        self.cancels.append(group.id)

    def _complete(self, group: Group) -> None:
        """Tell the order; replace a group whose returns are all equal, within dynamic sampling's limit."""
        self.order.note(group.task, [trajectory.is_success for trajectory in group.members])
        if self._max_refills is None or self._uniform >= self._max_refills * self._per_update:
            return
        if is_uniform(group.members):
            self._uniform += 1
            self._replace(group, "uniform")

    def _replace(self, group: Group, reason: str) -> None:
        """Take a group out; the next admission puts another one in its place."""
        split, task = self.order.split, group.task
        self._tell("group_replaced", reason=reason, group_id=group.id, split=split, task=task)
        self.counts["tokens_wasted"] += sum(trajectory.num_tokens for trajectory in group.members)
        if group.missing:
            self._give_up(group, "group_replaced")
        del self._groups[group.id]

    # ---------------------------------------------------------------------------------- release

    def reserve(self) -> Reserved | None:
        """Reserve the groups of the next update; None while the ready ones do not suffice."""
        free = [group for group in self._groups.values() if group.update is None]
        ready = sorted((group for group in free if not group.missing), key=lambda g: (g.version, g.id))
        picked = sorted(ready[: self._per_update], key=lambda group: group.id)
        if len(picked) < self._per_update:
            return None
        chosen = {group.id for group in picked}
        if not self._is_in_time([group for group in free if group.id not in chosen]):
            return None
        for group in picked:
            group.update = self._reserved
        self._reserved += 1
        metrics = {}
        if self._max_refills is not None:
            left = sum(is_uniform(group.members) for group in picked)
            metrics = {"groups_replaced": float(self._uniform), "groups_uniform": float(left)}
        self._uniform = 0
        members = list(itertools.chain.from_iterable(group.members for group in picked))
        return Reserved(self._reserved - 1, members, metrics)

    def _is_in_time(self, rest: Sequence[Group]) -> bool:
        """Return whether the groups that stay behind can all be consumed in time, in later updates.

        A group admitted at version ``w`` must be in update ``w + max_lag`` at the latest.
        """
        due = [group.version + self.max_lag for group in rest]
        return all(
            sum(update <= self._reserved + ahead for update in due) <= ahead * self._per_update
            for ahead in range(self.max_lag + 1)
        )

    def commit(self, updates: int) -> None:
        """Consume the groups of the first ``updates`` updates: the weights after them exist."""
        self._consumed = updates
        self._groups = {
            id: group for id, group in self._groups.items() if group.update is None or group.update >= updates
        }

    # ----------------------------------------------------------------------------------- resume

    def cut(self, updates: int) -> tuple[dict[str, Any], list[Trajectory]]:
        """Return the ledger as it belongs to the weights after ``updates`` updates.

        Groups of later updates count as not consumed.

        Returns:
          JSON types, and the trajectories that are not consumed, sorted by (group, member).
        """
        held = [g for g in self._groups.values() if g.update is None or g.update >= updates]
        groups = [
            {"id": g.id, "task": g.task, "version": g.version, "missing": sorted(g.missing.items())}
            for g in held
        ]
        values = {
            "updates": updates,
            "next_group": self._next_group,
            "next_position": self._next_position,
            "again": list(self._again),
            "losses": sorted(self._losses.items()),
            "uniform": self._uniform,
            "outcomes": dict(self.outcomes),
            "counts": dict(self.counts),
            "groups": groups,
            **self.order.cut(),
        }
        if self._taken:
            values["taken"] = sorted(self._taken)
        return values, [trajectory for group in held for trajectory in group.members]

    def restore(self, values: dict[str, Any], trajectories: Sequence[Trajectory]) -> None:
        """Go on from a `cut`: only the attempts that had not ended start again."""
        self._reserved = self._consumed = values["updates"]
        self._next_group, self._next_position = values["next_group"], values["next_position"]
        self._taken = set(values.get("taken", ()))
        self._again = collections.deque(values["again"])
        self._losses = collections.Counter({int(task): losses for task, losses in values["losses"]})
        self._uniform = values["uniform"]
        self.order.restore(values)
        self.outcomes = collections.Counter(values["outcomes"])
        self.counts = collections.Counter(values["counts"])
        done: dict[int, dict[int, Trajectory]] = collections.defaultdict(dict)
        for trajectory in trajectories:
            done[trajectory.group_id][trajectory.member] = trajectory
        self._groups, self.starts, self.cancels = {}, [], []
        for entry in values["groups"]:
            missing = {int(member): retry for member, retry in entry["missing"]}
            members = done[entry["id"]]
            # Attempts begin again with the present weights, but what has ended keeps its age.
            version = entry["version"] if members else values["updates"]
            group = Group(entry["id"], entry["task"], version, missing, members)
            self._groups[group.id] = group
            self._start(group)
