"""The similarity of two phrases independent of word order, which WebShop's reward uses.

It equals RapidFuzz's ``token_set_ratio`` after the preprocessing of ``thefuzz`` 0.22 (text of any object,
characters 128 to 255 dropped, lower case, everything except letters and digits replaced by a space), rounded
to an integer. It is implemented here so that a worker needs no further package. A test compares it with the
original.
"""

from __future__ import annotations

import functools
import re

# Dropped characters, and the only letter whose lower case has two characters.
_FOLDED: dict[int, str | None] = {**dict.fromkeys(range(128, 256)), 0x130: "i"}
_NOT_WORD = re.compile(r"[\W_]")


def _prepare(value: object) -> str:
    text = str(value).translate(_FOLDED)
    return _NOT_WORD.sub(" ", text).lower().strip()


def _common_length(first: str, second: str) -> int:
    """Return the length of the longest common subsequence.

    This is Hyyrö's bit-parallel recurrence with Python's unbounded integers as bit vectors: bit i of ``row``
    is 0 if the subsequence grows at character i.
    """
    where: dict[str, int] = {}
    for position, character in enumerate(first):
        where[character] = where.get(character, 0) | 1 << position
    full = (1 << len(first)) - 1
    row = full
    for character in second:
        hits = row & where.get(character, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(first) - row.bit_count()


def _similarity(distance: int, length: int) -> float:
    return 100.0 - 100.0 * distance / length if length else 100.0


@functools.lru_cache(maxsize=1 << 14)
def token_set_ratio(first: object, second: object) -> int:
    """Return the similarity, from 0 to 100, of the word sets of two hashable values.

    The values are strings or tuples of strings. The result is 100 if one set contains the other one, and 0 if
    either is empty.
    """
    left, right = set(_prepare(first).split()), set(_prepare(second).split())
    if not left or not right:
        return 0
    common = left & right
    only_left, only_right = left - right, right - left
    if common and not (only_left and only_right):
        return 100
    left_text, right_text = " ".join(sorted(only_left)), " ".join(sorted(only_right))
    common_length = len(" ".join(sorted(common)))
    gap = int(bool(common))
    left_length = common_length + gap + len(left_text)
    right_length = common_length + gap + len(right_text)
    distance = len(left_text) + len(right_text) - 2 * _common_length(left_text, right_text)
    best = _similarity(distance, left_length + right_length)
    if common:
        best = max(
            best,
            _similarity(gap + len(left_text), common_length + left_length),
            _similarity(gap + len(right_text), common_length + right_length),
        )
    return round(best)
