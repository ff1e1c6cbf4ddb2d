"""What adapters share: panels of numbered tasks, the order of calls, and packages that may be absent."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from empg_envs.draw import Draw

BLOCK = 1 << 28  # numbers between the seeds of two splits
Reply = tuple[str, float, bool, bool, dict[str, Any]]


class ForeignEnv:
    """A base of environments: panels whose tasks are numbers, and an episode's order of calls.

    A subclass says how an episode begins (`_begin`) and goes on (`_act`).
    """

    def __init__(self, name: str, sizes: Mapping[str, int], max_turns: int) -> None:
        """Set the panels.

        Args:
          name: name of the environment, for messages.
          sizes: number of tasks of every split.
          max_turns: number of steps after which an episode is truncated.

        Raises:
          ValueError: a split has no task, or the limit is below 1.
        """
        for split, size in sizes.items():
            if not 1 <= size < BLOCK:
                raise ValueError(f"{name}: {split} must have 1 to {BLOCK - 1} tasks, not {size}")
        if max_turns < 1:
            raise ValueError(f"{name}: max_turns must be at least 1, not {max_turns}")
        self._name, self._sizes, self._max_turns = name, dict(sizes), max_turns
        self._draw = Draw(name, "reset", 0)
        self._turn = 0
        self._state = "has not begun"

    def list_splits(self) -> list[str]:
        """Return the names of the task panels."""
        return list(self._sizes)

    def num_tasks(self, split: str) -> int:
        """Return the size of a panel."""
        if split not in self._sizes:
            raise ValueError(f"unknown split {split!r} of {self._name}; there are {', '.join(self._sizes)}")
        return self._sizes[split]

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """Return a task's seed and hash."""
        seed = self._seed_of(split, index)
        return {"split": split, "index": index, "seed": seed, "content_hash": hash_of(self._name, seed)}

    def reset(
        self, seed: int | None = None, *, split: str | None = None, index: int | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode; without an index, ``seed`` draws one."""
        if seed is not None:
            self._draw = Draw(self._name, "reset", seed)
        split = self.list_splits()[0] if split is None else split
        index = self._draw.below(self.num_tasks(split)) if index is None else index
        self._seed_of(split, index)  # refuses an index that does not exist
        self._turn = 0
        opening = self._begin(split, index)
        self._state = ""
        return opening

    def step(self, action: str) -> Reply:
        """Carry out an action.

        Raises:
          RuntimeError: before the first reset, or after the end of the episode.
        """
        if self._state:
            raise RuntimeError(f"the episode {self._state}: call reset first")
        observation, reward, terminated, truncated, info = self._act(action)
        self._turn += 1
        truncated = not terminated and (truncated or self._turn >= self._max_turns)
        if terminated or truncated:
            self._state = "has ended"
        return observation, float(reward), terminated, truncated, info

    def close(self) -> None:
        """End the episode."""
        self._state = "has not begun"

    def _begin(self, split: str, index: int) -> tuple[str, dict[str, Any]]:
        raise NotImplementedError

    def _act(self, action: str) -> Reply:
        raise NotImplementedError

    def _seed_of(self, split: str, index: int) -> int:
        """Return a number that no other task of any split has."""
        count = self.num_tasks(split)
        if not 0 <= index < count:
            raise IndexError(f"task {split}/{index} does not exist: the split has {count} tasks")
        return list(self._sizes).index(split) * BLOCK + index


def make_sizes(tasks: int, held_out: int) -> dict[str, int]:
    """Return the usual panels: ``train``, and ``valid`` and ``test`` of one size."""
    return {"train": tasks, "valid": held_out, "test": held_out}


def hash_of(*parts: object) -> str:
    """Return a hash of the parts' texts, the same on every machine."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def import_package(name: str, wheel: str = "", extra: str = "adapters") -> ModuleType:
    """Import an optional package.

    Args:
      name: the module.
      wheel: its name in the package index, where that differs.
      extra: the extra of this project that brings it.

    Raises:
      ValueError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"the package {wheel or name} is needed ({error}): in the clone: pip install -e '.[{extra}]'"
        ) from None
