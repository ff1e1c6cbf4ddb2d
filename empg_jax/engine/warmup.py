"""All of an engine's programs, each called once: what is compiled before the first episode."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from empg_jax.engine.programs import Chunk, Programs, Request
from empg_jax.engine.sizes import EngineConfig
from empg_jax.parallel.ahead import Call
from empg_jax.types import Params


def call_all(programs: Programs, config: EngineConfig, params: Params, request: Request, call: Call) -> None:
    """Call each of the ``config.num_programs`` programs once, on nothing: they write nothing that counts.

    Args:
      programs: the programs.
      config: the engine's sizes.
      params: placed weights.
      request: one of no steps.
      call: gets a program and its arguments, and returns what it returns (see `parallel.ahead`).
    """
    cache = None
    for capacity, larger in zip(config.cache_buckets, (*config.cache_buckets[1:], 0), strict=True):
        if cache is None or not config.page_tokens:
            cache = None  # freed before the next one is made
            cache = programs.new_cache(capacity)

        def pages(rows: int, capacity: int = capacity) -> np.ndarray | None:
            size = config.page_tokens
            return np.zeros((rows, -(-capacity // size)), np.int32) if size else None

        for length in config.prefill_lengths(capacity):
            for rows in config.prefill_rows(length):
                # All spans are empty: nothing is written.
                index = np.full(rows, config.slots, np.int32)
                tokens, spans = np.zeros((rows, length), np.int32), np.zeros((rows, 2), np.int32)
                cache = call(programs.prefill, params, cache, Chunk(index, tokens, spans, pages(rows)))
        if config.copies_rows and not config.page_tokens:
            cache = call(programs.copy_rows, cache, np.zeros((config.slots, 3), np.int32))
        at_capacity = dataclasses.replace(request, pages=pages(config.slots))
        cache, _, _ = call(programs.decode, params, cache, at_capacity)
        if larger and not config.page_tokens:
            jax.block_until_ready(call(programs.grow, cache, larger))
    if config.copies_rows and config.page_tokens:
        pairs = np.full((config.slots, 2), config.num_pages, np.int32)
        jax.block_until_ready(call(programs.copy_pages, cache, pairs))
