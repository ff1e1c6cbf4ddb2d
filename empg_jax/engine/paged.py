"""Keys and values in pages of one pool, so that memory is that of the live tokens, not of the longest row.

A shared beginning is used in place, not copied. Where the pool is full, conversations give way, page by page
from their ends: first what released ones left, then those that wait, then younger responses, whose tokens
are prefilled again when there is room. The oldest response always goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from empg_jax.engine.memory import Input, Memory
from empg_jax.engine.pages import Pages
from empg_jax.engine.prefill import Group, Wave, cut_waves, make_groups
from empg_jax.engine.programs import Chunk, Programs
from empg_jax.engine.sizes import EngineConfig
from empg_jax.engine.slots import Copy, Slots
from empg_jax.engine.stats import EngineStats
from empg_jax.models.decoder import KVCache
from empg_jax.types import Params


class PagedMemory(Memory):
    """A pool of pages, and the prefill of prompts into it; see `Memory`."""

    def __init__(self, programs: Programs, config: EngineConfig, cache: KVCache | None = None) -> None:
        super().__init__(programs, config, cache)
        self._pages = Pages(config.num_pages, config.page_tokens, config.slots)
        self._capacity = config.cache_buckets[0]
        self._in_flight = np.zeros(config.slots, bool)
        self._moves: dict[int, int] = {}  # by page, the one whose rows it gets
        self._evicted, self._peak = 0, 0.0

    @property
    def capacity(self) -> int:
        """Longest conversation that the programs in use read, in tokens."""
        return self._capacity

    def fit(self, table: Slots, in_flight: np.ndarray, *, is_empty: bool) -> None:
        """Begin a dispatch; see `Memory.fit`. The pool has its size from the beginning."""
        if self.cache is None:
            self.cache = self._programs.new_cache(self._config.cache_buckets[0])
        wanted = self._find_bucket(table, in_flight)
        self._capacity = wanted if is_empty else max(wanted, self._capacity)
        self._in_flight, self.is_pressed = in_flight.copy(), False
        # Of a response in progress all pages stay: it has some for tokens to come.
        rows = np.where(table.allowed > 0, self._config.max_tokens, table.rows)
        for slot in np.flatnonzero(self._pages.counts > -(-rows // self._pages.size)):
            self._pages.cut(int(slot), int(rows[slot]))

    def fill(self, params: Params | None, table: Slots, stats: EngineStats, limit: int = 0) -> None:
        """Cache what waits, as far as there is room; see `Memory.fill`."""
        before = table.kv_length.copy()
        super().fill(params, table, stats, limit)
        # The oldest may have waited for the prefill of others that found no room.
        missing = table.missing()
        oldest = next(iter(table.by_age(np.flatnonzero(table.allowed))), None)
        if oldest is not None and missing[oldest] and table.kv_length[oldest] <= before[oldest]:
            spans = {oldest: (int(table.kv_length[oldest]), int(missing[oldest]))}
            waves = [Wave((), make_groups(spans, self._config, self.capacity))]
            self._run(params, table, stats, cut_waves(waves, limit, self._config, self.capacity))

    def _copy(self, table: Slots, copies: Sequence[Copy]) -> Sequence[Copy]:
        """Let slots use the pages of others, as far as these have come; return what is shared."""
        shared = [copy for copy in copies if table.shareable[copy.donor] >= copy.count]
        for copy in shared:
            self._pages.share(copy.slot, copy.donor, copy.count)
        return shared

    def _place(self, table: Slots, group: Group) -> Group:
        spans = {slot: (start, count) for slot, start, count in group.spans}
        placed = set()
        for slot in table.by_age(list(spans)):
            start, count = spans[slot]
            # Else a part before it is missing: that was held back, or gave way.
            if table.kv_length[slot] == start and self._claim(table, slot, start, start + count):
                placed.add(slot)
        self.is_pressed |= len(placed) < len(spans)
        self._move()
        return Group(group.size, group.length, tuple(span for span in group.spans if span[0] in placed))

    def admit(self, table: Slots, allowed: np.ndarray, steps: int) -> np.ndarray:
        """Return ``allowed``, with 0 for the slots that there is no room for; see `Memory.admit`."""
        admitted = np.zeros_like(allowed)
        ahead = np.minimum(allowed, np.where(self._in_flight, steps + self._config.burst, steps))
        for slot in table.by_age(np.flatnonzero(allowed)):
            start = int(table.num_tokens[slot]) - 1
            if table.kv_length[slot] == start and self._claim(table, slot, start, start + int(ahead[slot])):
                admitted[slot] = allowed[slot]
        self.is_pressed |= bool((admitted < allowed).any())
        self._move()
        return admitted

    def locate(self, given: Input) -> Input:
        """Add the pages of its rows to a program's input."""
        slots = given.rows if isinstance(given, Chunk) else range(self._config.slots)
        pages = self._pages.table(slots, self._pages.count(self._capacity))
        return dataclasses.replace(given, pages=pages)

    def take_use(self) -> tuple[int, float]:
        """Return what gave way since the last call, and the largest share of pages in use."""
        use, self._evicted, self._peak = (self._evicted, self._peak), 0, self._pages.use
        return use

    # ------------------------------------------------------------------------------------ pressure

    def _claim(self, table: Slots, slot: int, start: int, stop: int) -> bool:
        """Give a slot pages to write rows into; others give way where none is free."""
        while self._pages.num_needed(slot, start, stop) > self._pages.num_free:
            victim = self._find_victim(table, slot)
            if victim is None:
                return False
            self._evicted += table.lose(victim, self._pages.drop_last(victim))
        kept = stop if self._in_flight[slot] else start  # the device may have written rows of the range
        self._moves |= {copy: page for page, copy in self._pages.claim(slot, start, stop, kept)}
        self._peak = max(self._peak, self._pages.use)
        return True

    def _find_victim(self, table: Slots, slot: int) -> int | None:
        """Find whose last page a slot gets next.

        First what released conversations left, the oldest first. Then those that wait, the newest first:
        where all take their turns, these return last. Then responses younger than the slot's own. What the
        device works on stays.
        """
        is_active, turns = table.allowed > 0, table.turns
        may = (self._pages.counts > 0) & ~self._in_flight & ~(is_active & (turns <= turns[slot]))
        may[slot] = False
        rank = np.where(is_active, 2, np.where(table.kv_length > 0, 1, 0))
        order = np.lexsort((np.where(rank == 0, turns, -turns), rank))
        found = [int(other) for other in order if may[other]]
        # A page that others use, too, is free only after the last one gives it up.
        return next((other for other in found if self._pages.ends_alone(other)), found[0] if found else None)

    def _move(self) -> None:
        """Copy the pages that others use, too, for those that are about to write into them."""
        if self._moves:
            pairs = np.full((self._config.slots, 2), self._config.num_pages, np.int32)
            pairs[: len(self._moves)] = [(page, copy) for copy, page in self._moves.items()]
            self.cache = self._programs.copy_pages(self.cache, pairs)
            self._moves = {}


def make_memory(programs: Programs, config: EngineConfig) -> Memory:
    """Return the empty memory that the sizes ask for, of rows or of pages."""
    kind = PagedMemory if config.page_tokens else Memory
    return kind(programs, config)
