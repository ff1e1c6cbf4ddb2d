"""Second bugs for tasks without siblings: made by mutation, tried over the gold files, and kept on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from empg_envs.cache import build_once
from empg_envs.swe import grading, mutate, patches
from empg_envs.swe.judge.second import SecondBug
from empg_envs.swe.tasks import Task, default_sources
from empg_envs.swe.tree import Tree

_log = logging.getLogger(__name__)

TRIES = 6  # mutations tried for a task
ENOUGH = 1  # of them kept

Statuses = Mapping[str, str]


class _NoTestsError(Exception):
    """No test of the task passes over the gold files, or none in time."""


class MadeBugs:
    """The bugs made for tasks without siblings: once for each task, for all processes of a machine.

    While one process makes them, the others that need them wait. Where none is found, that is kept, too.
    """

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
        self,
        task: Task,
        gold: Tree,
        run: Callable[[Tree, float], Statuses],
        timeout: float,
        *,
        within: float | None = None,
    ) -> list[SecondBug]:
        """Make bugs for a task, and keep them.

        Args:
          task: the task.
          gold: its repaired files.
          run: runs all tests over a tree within a number of seconds.
          timeout: seconds of the first run; it decides about those of the others.
          within: seconds of all runs together, after which what was found is kept. Without such a limit
            nothing is kept where no test passes over the gold files: it may be better another time.
        """
        place = _place(_key(task))
        if self.recall(task) is None:
            place.unlink(missing_ok=True)  # it is damaged

        def build(fresh: Path) -> None:
            found = self._find(task, gold, run, timeout, within)
            if not found:
                _log.warning("task %s is judged without a second bug: none was found", task.instance_id)
            fresh.write_text(json.dumps([dataclasses.asdict(bug) for bug in found]))

        with contextlib.suppress(_NoTestsError):
            build_once(place, build)
        return self.recall(task) or []

    def _find(
        self,
        task: Task,
        gold: Tree,
        run: Callable[[Tree, float], Statuses],
        timeout: float,
        within: float | None,
    ) -> list[SecondBug]:
        started = time.monotonic()
        end = started + (float("inf") if within is None else within)

        def run_in_time(tree: Tree, seconds: float) -> Statuses:
            left = end - time.monotonic()
            return run(tree, min(seconds, left)) if left > 0 else {}

        sound = _named(task, run_in_time(gold, timeout))
        if "PASSED" not in sound.values():
            if within is None:
                raise _NoTestsError
            return []
        patience = min(timeout, 5.0 + 10.0 * (time.monotonic() - started))
        changes = (tree for *_, tree in mutate.bugs(gold, self._draw.randrange(1 << 30)))
        return discover(gold, changes, lambda tree: run_in_time(tree, patience), sound)


def discover(
    gold: Tree, changes: Iterable[Tree], run: Callable[[Tree], Statuses], sound: Statuses
) -> list[SecondBug]:
    """Try mutations of the gold files, and keep some that break a few tests.

    Args:
      gold: the repaired files.
      changes: mutated trees.
      run: runs all tests over a tree.
      sound: statuses over the gold files, of the tests that count.
    """
    passing = [name for name, status in sound.items() if status == "PASSED"]

    def find_red(changed: Tree, names: Iterable[str]) -> tuple[str, ...]:
        statuses = run(changed)
        return tuple(name for name in names if statuses and statuses.get(name) not in grading.KEPT)

    found: list[SecondBug] = []
    for number, changed in enumerate(changes):
        if number >= TRIES or len(found) >= ENOUGH:
            break
        red = find_red(changed, passing)
        if not 0 < len(red) <= max(1, len(passing) // 2):
            continue
        red = find_red(changed, red)  # some tests fail now and then
        if red:
            found.append(SecondBug(patches.diff(gold, changed)[0], red))
    return found


def _named(task: Task, statuses: Statuses) -> Statuses:
    """Return the statuses of the tests that a task names; of the others nobody says that they are steady."""
    if task.expected is not None:
        names = [grading.short_name(name) for name in task.expected]
    else:
        names = [*task.fail_to_pass, *task.pass_to_pass]
    whole = set(names)
    cut = tuple(name for name in names if name.count("[") > name.count("]"))
    return {
        name: status for name, status in statuses.items() if name in whole or (cut and name.startswith(cut))
    }


def _key(task: Task) -> str:
    row = {name: value for name, value in task.row.items() if name != "split"}  # it is the source's affair
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


def _place(key: str) -> Path:
    return default_sources() / "second" / f"{key}.json"
