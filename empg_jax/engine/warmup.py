"""Compilation of all of an engine's programs before the first episode."""

from __future__ import annotations

import dataclasses
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
    cache = None
    for capacity, larger in zip(config.cache_buckets, (*config.cache_buckets[1:], 0), strict=True):
        if cache is None or not config.page_tokens:
            cache = programs.new_cache(capacity)

        def pages(rows: int, capacity: int = capacity) -> np.ndarray | None:
            size = config.page_tokens
            return np.zeros((rows, -(-capacity // size)), np.int32) if size else None

        for length in config.prefill_lengths(capacity):
            for rows in config.prefill_rows(length):
                check()
                # All spans are empty: nothing is written.
                index = np.full(rows, config.slots, np.int32)
                tokens, spans = np.zeros((rows, length), np.int32), np.zeros((rows, 2), np.int32)
                cache = programs.prefill(params, cache, Chunk(index, tokens, spans, pages(rows)))
        if config.copies_rows and not config.page_tokens:
            check()
            cache = programs.copy_rows(cache, np.zeros((config.slots, 3), np.int32))
        check()
        cache, _, _ = programs.decode(params, cache, dataclasses.replace(request, pages=pages(config.slots)))
        if larger and not config.page_tokens:
            check()
            jax.block_until_ready(programs.grow(cache, larger))
    if config.copies_rows and config.page_tokens:
        check()
        pairs = np.full((config.slots, 2), config.num_pages, np.int32)
        jax.block_until_ready(programs.copy_pages(cache, pairs))
