"""The replay buffer: trajectories come in one by one and leave as complete groups.

A group leaves when all its members have arrived (or it was closed with fewer) and its oldest policy version
is at most ``max_lag`` behind. All data is on the host. The buffer is one of the four owners of state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from empg_jax.types import Trajectory


@dataclasses.dataclass
class BufferStats:
    """Counts since the buffer was made."""

    added: int = 0
    released: int = 0
    stale_groups: int = 0
    refilled: int = 0


class ReplayBuffer:
    """Finished trajectories, held by group until the group is complete.

    Args:
      group_size: members of a complete group.
      max_lag: largest allowed ``version - oldest_version`` of a released group.
    """

    def __init__(self, *, group_size: int, max_lag: int) -> None:
        if group_size < 1 or max_lag < 0:
            raise ValueError(f"group_size={group_size} must be >= 1 and max_lag={max_lag} >= 0")
        self.group_size, self.max_lag = group_size, max_lag
        self.stats = BufferStats()
        self._groups: dict[int, dict[int, Trajectory]] = {}
        self._closed: set[int] = set()

    def add(self, trajectory: Trajectory) -> None:
        """Store a trajectory. A discarded one is refused, because it is sampled again instead.

        Raises:
          ValueError: the trajectory was discarded, or the buffer already holds that member of its group.
        """
        if not trajectory.outcome.is_trained:
            raise ValueError(f"a discarded trajectory ({trajectory.outcome.reason}) cannot be stored")
        group = self._groups.setdefault(trajectory.group_id, {})
        if trajectory.member in group:
            raise ValueError(f"group {trajectory.group_id} already has member {trajectory.member}")
        group[trajectory.member] = trajectory
        self.stats.added += 1

    def close_group(self, group_id: int) -> None:
        """Let a group leave with the members that it has, because its deadline has passed."""
        # A group without any member has nothing to train on, so it cannot be closed.
        if group_id in self._groups:
            self._closed.add(group_id)

    def forget(self, group_id: int) -> None:
        """Drop all members of a group."""
        self._groups.pop(group_id, None)
        self._closed.discard(group_id)

    def members(self, group_id: int) -> list[Trajectory]:
        """Return the trajectories of a group that have arrived, sorted by member."""
        group = self._groups.get(group_id, {})
        return [group[member] for member in sorted(group)]

    def ready(self) -> list[int]:
        """List the groups that may leave, oldest first."""
        return sorted(
            group_id
            for group_id, group in self._groups.items()
            if len(group) == self.group_size or group_id in self._closed
        )

    def drop_stale(self, version: int) -> list[int]:
        """Forget groups whose oldest token is more than ``max_lag`` versions behind; returns their ids."""
        stale = [
            group_id
            for group_id, group in self._groups.items()
            if version - min(t.oldest_version for t in group.values()) > self.max_lag
        ]
        for group_id in stale:
            self.forget(group_id)
        self.stats.stale_groups += len(stale)
        return sorted(stale)

    def release(self, count: int) -> list[Trajectory] | None:
        """Take out the ``count`` oldest ready groups, by (group, member); None while fewer are ready."""
        ready = self.ready()[:count]
        if len(ready) < count:
            return None
        taken: list[Trajectory] = []
        for group_id in ready:
            taken.extend(self.members(group_id))
            self.forget(group_id)
        self.stats.released += len(taken)
        return taken

    def contents(self) -> list[Trajectory]:
        """Return every trajectory for a checkpoint, sorted by (group, member)."""
        return [trajectory for group_id in sorted(self._groups) for trajectory in self.members(group_id)]

    def restore(self, trajectories: Sequence[Trajectory]) -> None:
        """Put back the trajectories that `contents` returned."""
        for trajectory in trajectories:
            self._groups.setdefault(trajectory.group_id, {})[trajectory.member] = trajectory
