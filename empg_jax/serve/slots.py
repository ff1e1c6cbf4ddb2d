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


class SlotTable:
    """The slots of an engine: busy ones, ones that keep a conversation, and empty ones.

    Args:
      num_slots: their number.
    """

    def __init__(self, num_slots: int) -> None:
        self._empty = list(range(num_slots))[::-1]
        self._kept: dict[int, _Kept] = {}
        self._busy: set[int] = set()
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
        client cut that response or wrote it in another way. Else an empty slot is taken, and without any the
        one whose last use is longest ago; what it shares with the prompt stays.
        """
        tokens = np.asarray(prompt, np.int32)
        shared = {slot: count_equal(kept.tokens, tokens) for slot, kept in self._kept.items()}
        going_on = [slot for slot, length in shared.items() if length > self._kept[slot].prompt_length]
        if going_on:
            slot = max(going_on, key=lambda slot: (shared[slot], self._kept[slot].used))
        elif self._empty:
            slot = self._empty.pop()
        elif self._kept:
            slot = min(self._kept, key=lambda slot: self._kept[slot].used)
        else:
            return None
        self._kept.pop(slot, None)
        self._busy.add(slot)
        return Place(slot, shared.get(slot, 0))

    def keep(self, slot: int, tokens: np.ndarray, prompt_length: int) -> None:
        """Free a busy slot that keeps its conversation."""
        self._busy.remove(slot)
        self._kept[slot] = _Kept(tokens, prompt_length, next(self._clock))

    def clear(self) -> None:
        """Forget the conversations of all slots that do not answer."""
        self._empty.extend(self._kept)
        self._kept.clear()
