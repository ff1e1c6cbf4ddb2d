"""The order of tasks: which task a group gets, and when a pass over the panel begins anew."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class TaskOrder:
    """The tasks in training order: a pure function, with a new permutation for every pass over the panel."""

    split: str
    num_tasks: int
    seed: int

    def task_at(self, position: int) -> int:
        """Return the index in the panel of the task at a position of the order."""
        epoch, index = divmod(position, self.num_tasks)
        return int(_permutation(self.seed, epoch, self.num_tasks)[index])


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)
