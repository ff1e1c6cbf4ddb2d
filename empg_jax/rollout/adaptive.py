"""Tasks drawn by their estimated success: those that are solved about half of the time come most often.

The record of a task holds its attempts ``n`` and the solved ones ``s``, each halved when a new group of the
task is complete, so that old policies fade: ``n = n / 2 + k`` for a group of ``k`` attempts. The estimate has
a uniform Beta prior, ``p = (s + 1) / (n + 2)``, and a task is drawn with a probability in proportion to

    FLOOR + (1 - FLOOR) * 4 * p * (1 - p)

which is 1 for a task that was never tried, and never below `FLOOR`, so that no task starves. Groups of
equal returns teach a group baseline nothing; ``p * (1 - p)`` is the variance of an attempt's success.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

FLOOR = 0.05
FADE = 0.5  # what is left of a task's record when a new group of it is complete
_STREAM = 1  # keeps these draws apart from the permutations of the uniform order


def estimate_success(attempts: float, solved: float) -> float:
    """Return the mean of a task's success under a uniform prior."""
    return (solved + 1.0) / (attempts + 2.0)


def weigh(attempts: float, solved: float) -> float:
    """Return the weight of a task with this record, in [FLOOR, 1]."""
    p = estimate_success(attempts, solved)
    return FLOOR + (1.0 - FLOOR) * 4.0 * p * (1.0 - p)


def draw(weights: np.ndarray, key: Sequence[int]) -> int:
    """Draw an index with a probability in proportion to its weight: a pure function of weights and key."""
    ends = np.cumsum(weights)
    drawn = np.random.default_rng(key).random() * ends[-1]
    # A sum that was rounded up may lie beyond the last end.
    return int(min(np.searchsorted(ends, drawn, side="right"), np.flatnonzero(weights)[-1]))


class AdaptiveOrder:
    """The tasks by estimated success, for `empg_jax.rollout.ledger.Ledger`.

    Args:
      split: the panel.
      num_tasks: its tasks.
      seed: of the draws.
      share: (index, number) of this host, which draws every ``number``-th task: so its record of them is
        whole, and no two hosts play the same task at a time.
    """

    def __init__(self, split: str, num_tasks: int, seed: int, share: tuple[int, int] = (0, 1)) -> None:
        if share[1] > 1 and num_tasks < 2 * share[1]:  # a host's only task may fail for ever
            raise ValueError(f"{num_tasks} tasks cannot be shared by {share[1]} hosts: each needs two")
        self.split, self.num_tasks, self.seed, self._share = split, num_tasks, seed, share
        self.restore({})

    @property
    def num_drawn(self) -> int:
        """The number of this host's tasks."""
        return len(range(self._share[0], self.num_tasks, self._share[1]))

    def task_at(self, position: int, busy: Collection[int] = ()) -> int:
        """Draw the task for a place of the order; one in flight only where all of this host's tasks are.

        Args:
          position: the place.
          busy: tasks in flight.
        """
        free = self._weights.copy()
        free[list(busy)] = 0.0
        return draw(free if free.any() else self._weights, (self.seed, _STREAM, position))

    def note(self, task: int, solved: Sequence[bool]) -> None:
        """Add a complete group of a task to its record."""
        attempts, successes = self._record.get(task, (0.0, 0.0))
        self._put(task, attempts * FADE + len(solved), successes * FADE + sum(solved))

    def cut(self) -> dict[str, Any]:
        """Return the record as JSON types; `restore` goes on from them, bit for bit."""
        return {"solved": [[task, *values] for task, values in sorted(self._record.items())]}

    def restore(self, values: dict[str, Any]) -> None:
        """Go on from a `cut`; from nothing where it has no record."""
        self._record: dict[int, tuple[float, float]] = {}
        self._weights = np.zeros(self.num_tasks)
        self._weights[self._share[0] :: self._share[1]] = weigh(0.0, 0.0)
        for task, attempts, solved in values.get("solved", ()):
            self._put(task, attempts, solved)

    def _put(self, task: int, attempts: float, solved: float) -> None:
        self._record[task] = (attempts, solved)
        if task < self.num_tasks and task % self._share[1] == self._share[0]:
            self._weights[task] = weigh(attempts, solved)


def join_records(cuts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the records of all hosts, by index, for another number of hosts.

    A group may have ended on a host that did not draw it, after an earlier change of their number. The host
    that draws a task knows most of it.
    """
    joined: dict[int, list[float]] = {}
    for index, cut in enumerate(cuts):
        for task, *values in cut.get("solved", ()):
            if task % len(cuts) == index or task not in joined:
                joined[task] = values
    return {"solved": [[task, *joined[task]] for task in sorted(joined)]} if joined else {}
