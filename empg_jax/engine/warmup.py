"""Compilation of all of an engine's programs before the first episode."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from empg_jax.engine.programs import Chunk, Programs, Request
from empg_jax.engine.sizes import EngineConfig
from empg_jax.types import Params


def compile_all(
    programs: Programs,
    config: EngineConfig,
    params: Params,
    request: Request,
    check: Callable[[], None],
) -> None:
    """Dispatch every program of every bucket once, on nothing: they write nothing that counts.

    Args:
      programs: the programs.
      config: the engine's sizes.
      params: placed weights.
      request: one of no steps.
      check: called before each of the ``config.num_programs`` programs; it may raise to end the warm-up.
    """
    for capacity, larger in zip(config.cache_buckets, (*config.cache_buckets[1:], 0), strict=True):
        cache = programs.new_cache(capacity)
        for length in config.prefill_lengths(capacity):
            for rows in config.prefill_rows(length):
                check()
                # All spans are empty: nothing is written.
                index = np.full(rows, config.slots, np.int32)
                tokens, spans = np.zeros((rows, length), np.int32), np.zeros((rows, 2), np.int32)
                cache = programs.prefill(params, cache, Chunk(index, tokens, spans))
        if config.copies_rows:
            check()
            cache = programs.copy_rows(cache, np.zeros((config.slots, 3), np.int32))
        check()
        cache, _, _ = programs.decode(params, cache, request)
        if larger:
            check()
            jax.block_until_ready(programs.grow(cache, larger))
