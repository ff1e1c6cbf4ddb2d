"""A second bug in the repaired tree, which tests with known names must find: else they find nothing.

The bugs are those of other tasks over the same original files, whose failing tests are known. For a task that
has no such siblings they are made by mutation (`empg_envs.swe.judge.made`).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Sequence

from empg_envs.swe import patches
from empg_envs.swe.tree import Tree

MOST_TESTS = 3  # tests run over the second tree


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
