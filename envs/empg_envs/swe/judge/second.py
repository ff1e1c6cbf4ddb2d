"""A second bug in the repaired tree, which tests with known names must find: else they find nothing.

The bugs are those of other tasks over the same original files, whose failing tests are known. For a task that
has no such siblings they are made by mutation, and tried once over the gold files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from empg_envs.swe import patches
from empg_envs.swe.tree import Tree

MOST_TESTS = 3  # tests run over the second tree
TRIES = 6  # mutations tried for a task without siblings
ENOUGH = 1  # of them kept
KEPT = frozenset(("PASSED", "XFAIL", "SKIPPED"))

Statuses = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class SecondBug:
    """A bug with known consequences.

    Attributes:
      patch: from the sound files to the broken ones.
      red: the tests that it breaks.
    """

    patch: str
    red: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class SecondTree:
    """A repaired tree with another bug.

    Attributes:
      tree: the files.
      red: tests of which at least one must fail.
    """

    tree: Tree
    red: tuple[str, ...]


def choose(
    tree: Tree, bugs: Sequence[SecondBug], wanted: Iterable[str], draw: random.Random
) -> SecondTree | None:
    """Insert one of the bugs that fit into a tree; None if none fits.

    Args:
      tree: the repaired files.
      bugs: the bugs to choose from.
      wanted: tests that should be among those that fail: the ones that the patch had to repair.
      draw: makes the choice.
    """
    aims = set(wanted)
    found = []
    for bug in draw.sample(list(bugs), len(bugs)):
        try:
            changed = patches.apply(tree, bug.patch)
        except patches.PatchError:
            continue
        if changed == tree:
            continue
        shared = [name for name in bug.red if name in aims]
        names = shared or list(bug.red)
        chosen = SecondTree(changed, tuple(sorted(draw.sample(names, min(MOST_TESTS, len(names))))))
        if shared:
            return chosen
        found.append(chosen)
    return found[0] if found else None


def remember(path: Path, bugs: Sequence[SecondBug]) -> None:
    """Write the bugs made for a task, so that other processes need not make them again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps([dataclasses.asdict(bug) for bug in bugs]))
    fresh.replace(path)


def recall(path: Path) -> list[SecondBug] | None:
    """Read the bugs made for a task; None if there are none, or the file is damaged."""
    try:
        return [SecondBug(str(bug["patch"]), tuple(bug["red"])) for bug in json.loads(path.read_text())]
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
        red = tuple(name for name in passing if statuses.get(name) not in KEPT)
        if red and statuses and len(red) <= max(1, len(passing) // 2):
            found.append(SecondBug(patches.diff(gold, changed)[0], red))
    return found
