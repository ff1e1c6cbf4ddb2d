"""Second bugs for tasks without siblings: made by mutation, tried over the gold files, and kept on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from empg_envs.swe import grading, mutate, patches
from empg_envs.swe.judge.second import SecondBug
from empg_envs.swe.tasks import Task, default_sources
from empg_envs.swe.tree import Tree

TRIES = 6  # mutations tried for a task
ENOUGH = 1  # of them kept

Statuses = Mapping[str, str]


class MadeBugs:
    """The bugs made for tasks without siblings: once for each task, for all processes of a machine."""

    def __init__(self, draw: random.Random) -> None:
        """Store what decides about mutations."""
        self._draw = draw
        self._known: dict[str, list[SecondBug]] = {}

    def recall(self, task: Task) -> list[SecondBug] | None:
        """Return what was made for a task, by its content; None if nothing was, or it is damaged."""
        key = _key(task)
        if key not in self._known:
            try:
                kept = json.loads(_place(key).read_text())
                self._known[key] = [SecondBug(str(bug["patch"]), tuple(bug["red"])) for bug in kept]
            except (OSError, ValueError, KeyError, TypeError):
                return None
        return self._known[key]

    def make(
        self, task: Task, gold: Tree, run: Callable[[Tree, float], Statuses], timeout: float
    ) -> list[SecondBug]:
        """Make bugs for a task, and keep them.

        Args:
          task: the task.
          gold: its repaired files.
          run: runs all tests over a tree within a number of seconds.
          timeout: seconds of the first run; it decides about those of the others.
        """
        started = time.monotonic()
        sound = run(gold, timeout)
        if "PASSED" not in sound.values():
            return []  # a failure, or the limit: another time
        patience = min(timeout, 5.0 + 10.0 * (time.monotonic() - started))
        changes = (tree for *_, tree in mutate.bugs(gold, self._draw.randrange(1 << 30)))
        found = discover(gold, changes, lambda tree: run(tree, patience), sound)
        key = _key(task)
        place = _place(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_name(f"{place.name}.{os.getpid()}")
        fresh.write_text(json.dumps([dataclasses.asdict(bug) for bug in found]))
        fresh.replace(place)
        self._known[key] = found
        return found


def discover(
    gold: Tree, changes: Iterable[Tree], run: Callable[[Tree], Statuses], sound: Statuses
) -> list[SecondBug]:
    """Try mutations of the gold files, and keep some that break a few tests.

    Args:
      gold: the repaired files.
      changes: mutated trees.
      run: runs all tests over a tree.
      sound: statuses over the gold files.
    """
    passing = [name for name, status in sound.items() if status == "PASSED"]
    found: list[SecondBug] = []
    for number, changed in enumerate(changes):
        if number >= TRIES or len(found) >= ENOUGH:
            break
        statuses = run(changed)
        red = tuple(name for name in passing if statuses.get(name) not in grading.KEPT)
        if red and statuses and len(red) <= max(1, len(passing) // 2):
            found.append(SecondBug(patches.diff(gold, changed)[0], red))
    return found


def _key(task: Task) -> str:
    row = {name: value for name, value in task.row.items() if name != "split"}  # it is the source's affair
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


def _place(key: str) -> Path:
    return default_sources() / "second" / f"{key}.json"
