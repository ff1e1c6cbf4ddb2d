"""Which pages of the pool hold the keys and values of each slot. Bookkeeping alone, without a device.

A page holds ``size`` rows (tokens) of one conversation, or the same rows of several: the beginning that they
share. Such a page is copied before one of them writes into it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Pages:
    """The pages of every slot, in the order of their rows, and how many slots use each page.

    Attributes:
      size: rows of a page.
      counts: int[S], pages of each slot.
    """

    def __init__(self, num_pages: int, size: int, slots: int) -> None:
        self.size = size
        self.counts = np.zeros(slots, np.int64)
        self._lists: list[list[int]] = [[] for _ in range(slots)]
        self._users = np.zeros(num_pages, np.int64)
        self._free = list(range(num_pages))[::-1]

    @property
    def num_free(self) -> int:
        """Pages that nobody uses."""
        return len(self._free)

    @property
    def use(self) -> float:
        """Share of the pages that are in use."""
        return 1.0 - len(self._free) / len(self._users)

    def count(self, rows: int) -> int:
        """Return the number of pages that this many rows need."""
        return -(-rows // self.size)

    def num_needed(self, slot: int, start: int, stop: int) -> int:
        """Count the free pages that it takes to write a slot's rows from ``start`` to ``stop``."""
        held = self._lists[slot][start // self.size : self.count(stop)]
        return self.count(stop) - start // self.size - sum(self._users[page] == 1 for page in held)

    def claim(self, slot: int, start: int, stop: int, kept: int) -> list[tuple[int, int]]:
        """Give a slot pages of its own for the rows from ``start`` to ``stop``.

        Returns:
          (page, its copy) for pages that others use, too, and that hold rows of the slot before ``kept``.

        Raises:
          ValueError: the rows before ``start`` have no pages, or `num_needed` pages are not free.
        """
        pages, first = self._lists[slot], start // self.size
        if self.count(start) > len(pages):
            raise ValueError(
                f"slot {slot} has {len(pages)} pages of {self.size} rows: row {start} is too far"
            )
        if (needed := self.num_needed(slot, start, stop)) > self.num_free:
            raise ValueError(f"slot {slot} needs {needed} pages, and {self.num_free} are free")
        moves = []
        for place in range(first, self.count(stop)):
            if place == len(pages):
                pages.append(self._take())
            elif self._users[pages[place]] > 1:
                old, pages[place] = pages[place], self._take()
                self._leave(old)
                if place * self.size < kept:
                    moves.append((old, pages[place]))
        self.counts[slot] = len(pages)
        return moves

    def share(self, slot: int, donor: int, rows: int) -> None:
        """Let a slot use the pages of another one's first rows in place of its own ones."""
        pages = self._lists[donor][: self.count(rows)]
        self._users[pages] += 1
        self.cut(slot, 0)
        self._lists[slot] = pages
        self.counts[slot] = len(pages)

    def cut(self, slot: int, rows: int) -> None:
        """Give up a slot's pages behind its first rows."""
        while self._lists[slot][self.count(rows) :]:
            self.drop_last(slot)

    def drop_last(self, slot: int) -> int:
        """Give up a slot's last page; return the rows that are left."""
        self._leave(self._lists[slot].pop())
        self.counts[slot] -= 1
        return int(self.counts[slot]) * self.size

    def ends_alone(self, slot: int) -> bool:
        """Whether the slot's last page is free once the slot gives it up."""
        return bool(self._lists[slot]) and bool(self._users[self._lists[slot][-1]] == 1)

    def table(self, slots: Sequence[int] | np.ndarray, columns: int) -> np.ndarray:
        """Return the first pages of some slots, int32[len(slots), columns], filled up with page 0.

        A number beyond the slots is a row without pages.
        """
        table = np.zeros((len(slots), columns), np.int32)
        for row, slot in enumerate(slots):
            if slot < len(self._lists):
                pages = self._lists[slot][:columns]
                table[row, : len(pages)] = pages
        return table

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _leave(self, page: int) -> None:
        self._users[page] -= 1
        if not self._users[page]:
            self._free.append(page)
