"""The order of tasks: which task a group gets, and when a pass over the panel begins anew."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np


class Order(Protocol):
    """The choice of the task for every place of the order, with what it remembers of complete groups."""

    @property
    def split(self) -> str:
        """The panel of the tasks."""
        ...

    @property
    def num_drawn(self) -> int:
        """The number of different tasks that this host draws in time."""
        ...

    def task_at(self, position: int, busy: Collection[int] = ()) -> int:
        """Return the index of the task for a place, given the tasks in flight."""
        ...

    def note(self, task: int, solved: Sequence[bool]) -> None:
        """Hear of a complete group: which of its attempts solved the task."""
        ...

    def cut(self) -> dict[str, Any]:
        """Return what it remembers, as JSON types."""
        ...

    def restore(self, values: dict[str, Any]) -> None:
        """Go on from a `cut`."""
        ...


@dataclasses.dataclass(frozen=True)
class TaskOrder:
    """The tasks in training order: a pure function, with a new permutation for every pass over the panel."""

    split: str
    num_tasks: int
    seed: int

    @property
    def num_drawn(self) -> int:
        """The whole panel: every pass over it deals the tasks to the hosts anew."""
        return self.num_tasks

    def task_at(self, position: int, busy: Collection[int] = ()) -> int:
        """Return the index in the panel of the task at a position of the order."""
        epoch, index = divmod(position, self.num_tasks)
        return int(_permutation(self.seed, epoch, self.num_tasks)[index])

    def note(self, task: int, solved: Sequence[bool]) -> None:
        """Remember nothing."""

    def cut(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def restore(self, values: dict[str, Any]) -> None:
        """Take nothing."""


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)
