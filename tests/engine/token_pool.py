"""Stands for an engine's device programs: pages hold token ids, and a token follows from all before it.

A page that is lost, written over or copied wrongly gives another response, and nothing is compiled.
"""

import types
import zlib

import numpy as np

from empg_jax.engine.engine import Engine
from empg_jax.engine.paged import PagedMemory
from empg_jax.engine.programs import Burst
from empg_jax.models.decoder import DecoderConfig

MODEL = DecoderConfig(vocab_size=40)
NOTHING = -1


def follow(tokens, stops):
    """The token after these: one of ``stops`` every tenth time."""
    number = zlib.crc32(np.asarray(tokens, np.int32).tobytes())
    return stops[0] if number % 10 == 0 else number // 10 % 30


def answer(prompt, most, stops):
    """The response to a prompt."""
    held = list(prompt)
    while len(held) < len(prompt) + most and (len(held) == len(prompt) or held[-1] not in stops):
        held.append(follow(held, stops))
    return held[len(prompt) :]


class TokenPool:
    """The programs of a paged engine over one pool of token ids."""

    def __init__(self, config):
        self.config = config
        self.programs = types.SimpleNamespace(
            shards=1,
            new_cache=lambda _: np.full((config.num_pages, config.page_tokens), NOTHING),
            prefill=self.prefill,
            copy_pages=self.copy_pages,
            decode=self.decode,
        )

    def read(self, pool, pages, rows):
        return pool[pages].reshape(-1)[:rows]

    def write(self, pool, pages, position, token):
        pool[pages[position // self.config.page_tokens], position % self.config.page_tokens] = token

    def prefill(self, params, pool, chunk):
        for tokens, (start, count), pages in zip(chunk.tokens, chunk.spans, chunk.pages, strict=True):
            assert NOTHING not in self.read(pool, pages, start if count else 0)
            for place in range(count):
                self.write(pool, pages, start + place, tokens[place])
        return pool

    def copy_pages(self, pool, pairs):
        real = pairs[pairs[:, 1] < self.config.num_pages]
        pool[real[:, 1]] = pool[real[:, 0]]
        return pool

    def decode(self, params, pool, request):
        (steps, patience), state = request.limits, request.plan[:, :4].copy()
        on_device = state[:, 3] < 0
        state[on_device] = np.asarray(request.carried)[on_device]
        grid = (self.config.burst, self.config.slots)
        tokens, counts = np.zeros(grid, np.int32), np.zeros(self.config.slots, np.int64)
        active, done, number = state[:, 3] > 0, 0, 0
        while number < steps and active.any() and done < patience:
            for slot in np.flatnonzero(active):
                token, position, _, allowed = state[slot]
                self.write(pool, request.pages[slot], position, token)
                held = self.read(pool, request.pages[slot], position + 1)
                tokens[number, slot] = found = follow(held, self.config.stop_ids)
                counts[slot] += 1
                state[slot] = found, position + 1, state[slot, 2] + 1, allowed - 1
                if found in self.config.stop_ids or allowed == 1:
                    active[slot], done = False, done + 1
                    state[slot, 3] = 0
            number += 1
        numbers = np.zeros(grid, np.float32)
        return pool, state, Burst(tokens, numbers, numbers, counts, np.int32(number))


def make_engine(config):
    """An engine over a pool of token ids."""
    engine = Engine(MODEL, config, seed=0)
    engine._programs = TokenPool(config).programs
    engine._memory = PagedMemory(engine._programs, config)
    engine._params, engine.version = {}, 0
    return engine
