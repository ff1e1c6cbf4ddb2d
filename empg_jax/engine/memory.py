"""What the device holds of the conversations: keys and values, in one row of the cache per slot.

`paged.PagedMemory` holds them in pages of a pool instead; what differs between the two is in these classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from empg_jax.engine.prefill import Group, Wave, cut_waves, make_chunk, make_pairs, plan_prefill
from empg_jax.engine.programs import Chunk, Programs, Request
from empg_jax.engine.sizes import EngineConfig
from empg_jax.engine.slots import Copy, Slots
from empg_jax.engine.stats import EngineStats
from empg_jax.models.decoder import KVCache
from empg_jax.types import Params

Input = TypeVar("Input", Chunk, Request)


class Memory:
    """The cache, as long as the longest conversation needs it, and the prefill of prompts.

    Args:
      programs: the engine's programs.
      config: its sizes.
      cache: an empty cache; None: it is made when it is needed.

    Attributes:
      cache: the KV cache; None where there is none.
      is_pressed: a response of the newest dispatch was held back for lack of room.
    """

    is_pressed = False

    def __init__(self, programs: Programs, config: EngineConfig, cache: KVCache | None = None) -> None:
        self._programs, self._config = programs, config
        self.cache = cache

    @property
    def capacity(self) -> int:
        """Longest conversation that fits now, in tokens; 0 without a cache."""
        return 0 if self.cache is None else int(self.cache[0][0].shape[2])

    def fit(self, table: Slots, in_flight: np.ndarray, *, is_empty: bool) -> None:
        """Begin a dispatch: make the cache long enough for every conversation after the next burst.

        Args:
          table: the conversations.
          in_flight: bool[S], slots that the device works on.
          is_empty: nothing in the cache is of use: a new one, which may be shorter, takes its place.
        """
        wanted = self._find_bucket(table, in_flight)
        if self.cache is None or (is_empty and self.capacity != wanted):
            self.cache = None  # freed before the new one is made
            self.cache = self._programs.new_cache(wanted)
        # One bucket at a time: `warm_up` compiled the growth from each bucket to the next one only.
        for capacity in self._config.cache_buckets:
            if self.capacity < capacity <= wanted:
                self.cache = self._programs.grow(self.cache, capacity)

    def _find_bucket(self, table: Slots, in_flight: np.ndarray) -> int:
        # The largest bucket holds max_tokens, and `submit` admits nothing longer: a bucket is always found.
        return next(n for n in self._config.cache_buckets if n >= table.longest(in_flight))

    def fill(self, params: Params | None, table: Slots, stats: EngineStats, limit: int = 0) -> None:
        """Cache every uncached token, except the newest, of the conversations that await a response.

        Args:
          params: placed weights.
          table: the conversations; it is told what the cache then holds.
          stats: counts what is copied and computed.
          limit: most tokens to compute of one conversation; the rest, and what waits for them, stays
            uncached. 0: all.
        """
        table.reuse()
        waves = plan_prefill(table, self._config, self.capacity)
        self._run(params, table, stats, cut_waves(waves, limit, self._config, self.capacity))

    def _run(self, params: Params | None, table: Slots, stats: EngineStats, waves: Sequence[Wave]) -> None:
        """Dispatch a plan."""
        for wave in waves:
            copies = self._copy(table, wave.copies)
            stats.shared_tokens += table.take_copies(copies)
            _grow(table, {copy.slot: copy.count for copy in copies})
            for planned in wave.groups:
                group = self._place(table, planned)
                if group.spans:
                    chunk = self.locate(make_chunk(group, table))
                    self.cache = self._programs.prefill(params, self.cache, chunk)
                    stats.prefilled_tokens += group.num_tokens
                    _grow(table, {slot: start + count for slot, start, count in group.spans})

    def _copy(self, table: Slots, copies: Sequence[Copy]) -> Sequence[Copy]:
        """Copy rows from slot to slot; return what was copied."""
        if copies:
            pairs = make_pairs(copies, self._config)
            self.cache = self._programs.copy_rows(self.cache, pairs)
        return copies

    def _place(self, table: Slots, group: Group) -> Group:
        """Return the part of a prefill dispatch that there is room for."""
        return group

    def admit(self, table: Slots, allowed: np.ndarray, steps: int) -> np.ndarray:
        """Return ``allowed``, with 0 for the slots that there is no room for.

        Args:
          table: the conversations.
          allowed: int[S], tokens that each slot may sample.
          steps: steps of the burst.
        """
        return allowed

    def locate(self, given: Input) -> Input:
        """Add to a program's input where its rows are."""
        return given

    def take_use(self) -> tuple[int, float]:
        """Return the tokens that gave way since the last call, and the largest share of pages in use."""
        return 0, 0.0

    def lend(self, *, is_empty: bool) -> Memory:
        """Return the memory of other conversations; it takes the cache away where this one is empty."""
        taken, self.cache = (self.cache, None) if is_empty else (None, self.cache)
        return type(self)(self._programs, self._config, taken)


def _grow(table: Slots, held: Mapping[int, int]) -> None:
    """Note how many first tokens of these slots have keys in the cache."""
    if held:
        table.grow(np.asarray(list(held), np.int64), np.asarray(list(held.values()), np.int64))
