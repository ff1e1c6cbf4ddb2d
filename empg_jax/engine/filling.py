"""What the device does before a burst: the cache becomes long enough, and prompts are written into it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from empg_jax.engine.prefill import cut_waves, make_chunk, make_pairs, plan_prefill
from empg_jax.engine.programs import Programs
from empg_jax.engine.sizes import EngineConfig
from empg_jax.engine.slots import Slots
from empg_jax.models.decoder import KVCache
from empg_jax.types import Params


class Filled(NamedTuple):
    """The cache after a prefill; the tokens that were copied into it, and those that were computed."""

    cache: KVCache
    shared: int
    computed: int


def measure(cache: KVCache | None) -> int:
    """Return the physical length of a cache in tokens; 0 where there is none."""
    return 0 if cache is None else int(cache[0][0].shape[2])


def fit_cache(
    programs: Programs, config: EngineConfig, cache: KVCache | None, longest: int, *, is_empty: bool
) -> KVCache:
    """Return a cache of the bucket that a conversation of ``longest`` tokens needs, or a longer one.

    Args:
      programs: the engine's programs.
      config: its sizes.
      cache: the cache so far; it grows.
      longest: tokens of the longest conversation after the next burst.
      is_empty: nothing in the cache is of use: a new one, which may be shorter, takes its place.
    """
    # The largest bucket is max_tokens, and `submit` admits nothing longer: a bucket is always found.
    wanted = next(n for n in config.cache_buckets if n >= longest)
    if cache is None or (is_empty and measure(cache) != wanted):
        return programs.new_cache(wanted)
    # One bucket at a time: `warm_up` compiled the growth from each bucket to the next one only.
    for capacity in config.cache_buckets:
        if measure(cache) < capacity <= wanted:
            cache = programs.grow(cache, capacity)
    return cache


def fill(
    programs: Programs, config: EngineConfig, params: Params | None, cache: KVCache, table: Slots, limit: int
) -> Filled:
    """Cache every uncached token, except the newest, of the conversations that await a response.

    Args:
      programs: the engine's programs.
      config: its sizes.
      params: placed weights.
      cache: the cache (donated).
      table: the conversations; it is told what the cache then holds.
      limit: most tokens to compute of one conversation; the rest, and what waits for them, stays uncached. 0:
        all.
    """
    table.reuse()
    waves = plan_prefill(table, config, measure(cache), programs.shards)
    shared = computed = 0
    for wave in cut_waves(waves, limit, config, measure(cache)):
        if wave.copies:
            pairs = make_pairs(wave.copies, config.slots, programs.shards)
            cache = programs.copy_rows(cache, pairs)
            shared += table.take_copies(wave.copies)
        for group in wave.groups:
            cache = programs.prefill(params, cache, make_chunk(group, table))
            computed += group.num_tokens
        held = {copy.slot: copy.count for copy in wave.copies}
        held |= {slot: start + count for group in wave.groups for slot, start, count in group.spans}
        table.grow(np.asarray(list(held), np.int64), np.asarray(list(held.values()), np.int64))
    return Filled(cache, shared, computed)
