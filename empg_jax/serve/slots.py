"""The choice of a slot for a prompt: a conversation goes on where its keys and values are.

The slot of a finished request keeps its tokens and their KV. A prompt that begins with them continues there,
and only the rest is prefilled. Everything here is bookkeeping on token ids, without an engine.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from empg_jax.engine.slots import count_equal

GHOSTS = 4  # for each slot, conversations that lost theirs and are known again
MARK = 32  # tokens by which one is known again


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a prompt goes: ``kept`` of its tokens are in the slot already."""

    slot: int
    kept: int


@dataclasses.dataclass(slots=True)
class _Kept:
    tokens: np.ndarray
    prompt_length: int
    used: int  # the clock at its last use

    @property
    def mark(self) -> tuple[int, bytes]:
        """The end of what a prompt must begin with to go on here: its place, and some tokens before it."""
        stop = self.prompt_length + 1
        return stop, _cut(self.tokens, stop)


class SlotTable:
    """The slots of an engine: busy ones, ones that keep a conversation, and empty ones.

    A new conversation takes the place of the one whose last use is longest ago, since finished ones are not
    used again. But where more live ones take turns than there are slots, that one is always the next to go
    on, and every turn would be prefilled from its beginning. So a conversation that comes back after it lost
    its slot takes the place of the newest one, and the others stay; unless one of them has not been used for
    even longer than itself: that one is overdue, and probably finished.

    Args:
      num_slots: their number.
    """

    def __init__(self, num_slots: int) -> None:
        self._empty = list(range(num_slots))[::-1]
        self._kept: dict[int, _Kept] = {}
        self._busy: set[int] = set()
        self._ghosts: dict[tuple[int, bytes], int] = {}  # by mark, the clock at the last use
        self._most_ghosts = GHOSTS * num_slots
        self._clock = itertools.count()

    @property
    def busy(self) -> int:
        """Number of slots that answer."""
        return len(self._busy)

    @property
    def kept(self) -> int:
        """Number of slots that keep a finished conversation."""
        return len(self._kept)

    def take(self, prompt: Sequence[int] | np.ndarray) -> Place | None:
        """Take a slot for a prompt; None while all answer.

        A kept conversation goes on if the prompt reaches into its last response: it may end there, because a
        client cut that response or wrote it in another way. Else an empty slot is taken, and without any that
        of a kept conversation; what it shares with the prompt stays.
        """
        tokens = np.asarray(prompt, np.int32)
        shared = {slot: count_equal(kept.tokens, tokens) for slot, kept in self._kept.items()}
        going_on = [slot for slot, length in shared.items() if length > self._kept[slot].prompt_length]
        if going_on:
            slot = max(going_on, key=lambda slot: (shared[slot], self._kept[slot].used))
        elif self._empty:
            slot = self._empty.pop()
        elif self._kept:
            slot = self._choose(tokens)
            self._remember(self._kept[slot])
        else:
            return None
        self._kept.pop(slot, None)
        self._busy.add(slot)
        return Place(slot, shared.get(slot, 0))

    def _choose(self, tokens: np.ndarray) -> int:
        """Choose the kept conversation whose slot a prompt gets."""
        ages = {slot: kept.used for slot, kept in self._kept.items()}
        oldest = min(ages, key=ages.__getitem__)
        mark = next((mark for mark in self._ghosts if _cut(tokens, mark[0]) == mark[1]), None)
        if mark is None or ages[oldest] < self._ghosts.pop(mark):
            return oldest
        return max(ages, key=ages.__getitem__)

    def _remember(self, kept: _Kept) -> None:
        """Note that a conversation loses its slot; forget the one that did so first, if there are many.

        One that ended without a response has no mark by which it could be known.
        """
        if kept.mark[1]:
            self._ghosts[kept.mark] = kept.used
        if len(self._ghosts) > self._most_ghosts:
            del self._ghosts[next(iter(self._ghosts))]

    def keep(self, slot: int, tokens: np.ndarray, prompt_length: int) -> None:
        """Free a busy slot that keeps its conversation."""
        self._busy.remove(slot)
        self._kept[slot] = _Kept(np.asarray(tokens, np.int32), prompt_length, next(self._clock))

    def clear(self) -> None:
        """Forget the conversations of all slots that do not answer."""
        self._empty.extend(self._kept)
        self._kept.clear()
        self._ghosts.clear()


def _cut(tokens: np.ndarray, stop: int) -> bytes:
    """Cut out the tokens before ``stop``; empty where there are fewer."""
    return tokens[max(0, stop - MARK) : stop].tobytes() if stop <= len(tokens) else b""
