"""Segments with the same beginning: which ones share it, and how they are packed with one copy of it per row.

The attempts at a task begin with the same prompt, and all prompts of an environment with the same rules. The
shared beginning (trunk) stands in a row before the segments that continue it (branches). A trunk ends before
the last token of a prompt, so that every sampled token, and the token that predicts it, is in a branch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

# Tokens of a trunk at least: its branches read one more tile of keys, which a shorter one would not pay for.
SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class Family:
    """Segments that begin with the same ``length`` tokens; 0 tokens for a segment by itself."""

    items: tuple[int, ...]
    length: int = 0


@dataclasses.dataclass(frozen=True)
class _Run:
    """Neighbors in the order of their tokens, the families that save most among them, and that saving."""

    start: int
    stop: int
    families: tuple[tuple[int, int, int], ...]  # (start, stop, shared length)
    saved: int = 0


def find_families(beginnings: Sequence[np.ndarray]) -> list[Family]:
    """Split segments into families so that the fewest tokens remain.

    A prompt may begin with the rules of all tasks and go on with those of its own task. A segment has one
    trunk, so either of them is shared: the one that saves more tokens.

    Args:
      beginnings: the tokens of each segment that may be shared.

    Returns:
      The families; every segment is in one of them.
    """
    # In lexical order, segments with a common beginning are neighbors. Big-endian bytes sort like numbers.
    order = sorted(range(len(beginnings)), key=lambda i: (beginnings[i].astype(">u4").tobytes(), i))
    common = [_count_common(beginnings[a], beginnings[b]) for a, b in itertools.pairwise(order)]
    starts = {place: _Run(place, place + 1, ((place, place + 1, 0),)) for place in range(len(order))}
    stops = {run.stop: run for run in starts.values()}
    # The longest common beginnings first: each joins the runs on its two sides, whose own ones are longer.
    for place in sorted(range(len(common)), key=lambda place: -common[place]):
        if common[place] < SHORTEST:
            break
        run = _join(stops[place + 1], starts[place + 1], common[place])
        starts[run.start] = stops[run.stop] = run
    families, place = [], 0
    while place < len(order):
        run = starts[place]
        families += [Family(tuple(order[start:stop]), length) for start, stop, length in run.families]
        place = run.stop
    return families


def _join(left: _Run, right: _Run, length: int) -> _Run:
    """Join two runs: into one family with this shared length, or with the families that they have."""
    start, stop = left.start, right.stop
    saved = (stop - start - 1) * length
    if saved >= left.saved + right.saved:
        return _Run(start, stop, ((start, stop, length),), saved)
    return _Run(start, stop, left.families + right.families, left.saved + right.saved)


def _count_common(one: np.ndarray, other: np.ndarray) -> int:
    """Return the number of tokens that both begin with."""
    count = min(len(one), len(other))
    differs = one[:count] != other[:count]
    return int(differs.argmax()) if differs.any() else count


def pack_families(families: Sequence[Family], lengths: Sequence[int], capacity: int) -> list[list[Family]]:
    """Pack families into rows by first-fit decreasing; a family may be divided, and each part has its trunk.

    The largest family and its longest segment come first. A segment joins a part of its family if it can, and
    else begins another part in the first row that holds all of it.

    Args:
      families: the families.
      lengths: length of each segment, with its trunk.
      capacity: tokens per row.

    Returns:
      The parts of families in each row; a segment without company in its row has no trunk. Deterministic.

    Raises:
      ValueError: a segment is longer than a row.
    """
    rows: list[dict[int, list[int]]] = []  # segments by the number of their family
    room: list[int] = []

    def size(family: Family) -> int:
        return sum(lengths[item] - family.length for item in family.items) + family.length

    for number in sorted(range(len(families)), key=lambda number: (-size(families[number]), number)):
        family = families[number]
        # Longest first, because short items fill the gaps that long ones leave.
        for item in sorted(family.items, key=lambda item: (-lengths[item], item)):
            if lengths[item] > capacity:
                raise ValueError(
                    f"a segment of {lengths[item]} tokens does not fit a row of {capacity}: "
                    "raise rollout.max_tokens"
                )
            rest = lengths[item] - family.length
            fitting = (i for i, row in enumerate(rows) if number in row and rest <= room[i])
            if (place := next(fitting, None)) is None:
                rest = lengths[item]
                place = next((i for i, free in enumerate(room) if rest <= free), len(rows))
            if place == len(rows):
                rows.append({})
                room.append(capacity)
            rows[place].setdefault(number, []).append(item)
            room[place] -= rest
    return [
        [Family(tuple(items), families[n].length if len(items) > 1 else 0) for n, items in row.items()]
        for row in rows
    ]
