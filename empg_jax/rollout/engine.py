"""The sampling engine: slots, prefill, decode, and a KV cache that is kept across turns.

A slot holds one conversation. `Engine.submit` appends tokens to it (or starts it afresh) and asks for a
response; `Engine.step` runs one burst for every slot at once and returns the responses that ended. Only the
new tokens of a conversation are prefilled. The host reads from the device once per burst, never per token.

The cache is physically short and grows in buckets between dispatches, because unused capacity costs time in
every decode step. All shapes come from small bucket lists that `Engine.warm_up` compiles beforehand.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from empg_jax.models.decoder import DecoderConfig, KVCache, init_cache
from empg_jax.rollout.programs import EngineConfig as EngineConfig
from empg_jax.rollout.programs import compile_programs, init_slots
from empg_jax.types import Params


@dataclasses.dataclass(frozen=True, slots=True)
class Response:
    """One finished response. ``finish_reason`` is ``stop`` or ``length``; arrays as in `types.Turn`."""

    slot: int
    prompt_tokens: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    version: int
    finish_reason: str


@dataclasses.dataclass
class EngineStats:
    """Counts of work done, for metrics and benchmarks."""

    prefilled_tokens: int = 0  # real tokens written by prefill
    sampled_tokens: int = 0
    responses: int = 0
    decode_rows: int = 0  # rows x steps that decode dispatches spent
    useful_rows: int = 0  # of these, rows that sampled a token of a response
    bursts: int = 0


class Engine:
    """Continuous batching over slots, with each conversation's KV kept across turns.

    Args:
      model: the decoder's config.
      config: sizes and sampling settings.
      seed: run seed; keys are folded from (seed, stream, group, member, turn, position).
      temperature: divides the logits; statistics are recorded at it. 0 is greedy (statistics at 1).
      device: where the engine lives; default the first local device.
    """

    def __init__(
        self,
        model: DecoderConfig,
        config: EngineConfig,
        *,
        seed: int,
        temperature: float = 1.0,
        device: jax.Device | None = None,
    ) -> None:
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must not be negative")
        self.model, self.config = model, config
        self._temperature = np.float32(temperature)
        self.version = -1
        self.stats = EngineStats()
        self._device = device or jax.local_devices()[0]
        self._sharding = jax.sharding.SingleDeviceSharding(self._device)
        self._key = jax.device_put(jax.random.key(seed), self._sharding)
        self._params: Params | None = None
        self._programs = compile_programs(model, config)
        slots = config.slots
        self._history = np.zeros((slots, config.max_tokens), np.int32)
        self._num_tokens = np.zeros(slots, np.int64)  # tokens of the conversation known to the host
        self._kv_length = np.zeros(slots, np.int64)  # of these, tokens whose keys are in the cache
        self._prompt_length = np.zeros(slots, np.int64)
        self._ids = np.zeros((slots, 4), np.int32)
        self._is_pending = np.zeros(slots, bool)  # submitted, prefill not yet dispatched
        self._is_active = np.zeros(slots, bool)
        self._state = jax.device_put(init_slots(config), self._sharding)
        self._cache = self._new_cache(config.cache_buckets[0])

    # ------------------------------------------------------------------------------ conversations

    @property
    def has_work(self) -> bool:
        """True while a submitted response is unfinished."""
        return bool(self._is_active.any() or self._is_pending.any())

    def room(self, slot: int, num_new: int, *, is_fresh: bool) -> int:
        """Response tokens that would still fit after ``num_new`` more prompt tokens (may be <= 0)."""
        used = 0 if is_fresh else int(self._num_tokens[slot])
        return min(self.config.max_response_tokens, self.config.max_tokens - used - num_new)

    def submit(self, slot: int, tokens: Any, *, is_fresh: bool, ids: tuple[int, int, int, int]) -> None:
        """Append ``tokens`` to the slot's conversation and ask for a response.

        Args:
          slot: which conversation.
          tokens: prompt tokens that come after what the conversation already holds.
          is_fresh: forget the conversation first; ``tokens`` is then the whole prompt.
          ids: (stream, group, member, turn): what the sampling keys are folded from.

        Raises:
          RuntimeError: no weights are loaded, or the slot is still answering.
          ValueError: no prompt at all, or no room for a single response token.
        """
        if self._params is None:
            raise RuntimeError("Engine.submit before Engine.load: there are no weights to sample from")
        if self._is_active[slot] or self._is_pending[slot]:
            raise RuntimeError(f"slot {slot} is still answering")
        if self.room(slot, len(tokens), is_fresh=is_fresh) < 1:
            raise ValueError(
                f"slot {slot}: {len(tokens)} new tokens leave no room for a response within "
                f"max_tokens={self.config.max_tokens}"
            )
        if is_fresh:
            self._num_tokens[slot] = self._kv_length[slot] = 0
        start = int(self._num_tokens[slot])
        if start + len(tokens) == 0:
            raise ValueError(f"slot {slot}: an empty prompt cannot be answered")
        self._history[slot, start : start + len(tokens)] = tokens
        self._num_tokens[slot] = self._prompt_length[slot] = start + len(tokens)
        self._ids[slot] = ids
        self._is_pending[slot] = True

    def release(self, slot: int) -> None:
        """Forget the slot's conversation; a response in progress is dropped."""
        self._is_pending[slot] = self._is_active[slot] = False
        self._num_tokens[slot] = self._kv_length[slot] = 0

    def load(self, params: Params, version: int) -> None:
        """Make new weights live, and return when they are.

        Called at a turn boundary. The KV of live conversations is dropped: each is prefilled again, with
        the new weights, when it goes on.

        Args:
          params: stacked parameters, on any devices.
          version: the policy version that they are.

        Raises:
          RuntimeError: a response is in progress.
        """
        if self.has_work:
            raise RuntimeError("Engine.load in the middle of a turn: step the engine until has_work is False")
        moved = jax.device_put(params, self._sharding)
        self._params = jax.block_until_ready(self._programs.unstack(moved))
        self._kv_length[:] = 0
        self.version = version

    def take_stats(self) -> EngineStats:
        """The counts since the last call, which starts them again from zero."""
        stats, self.stats = self.stats, EngineStats()
        return stats

    # ------------------------------------------------------------------------------------ running

    def step(self) -> list[Response]:
        """Prefill what was submitted, decode one burst, and return the responses that ended."""
        if not self.has_work:
            return []
        self._fit_cache()
        self._prefill()
        self._cache, self._state, steps = self._programs.decode(
            self._params, self._cache, self._state, self._temperature
        )
        # The only read of the burst.
        is_active, counts, tokens, logprobs, entropies, steps = jax.device_get(
            (
                self._state.is_active,
                self._state.counts,
                self._state.tokens,
                self._state.logprobs,
                self._state.entropies,
                steps,
            )
        )
        self.stats.bursts += 1
        self.stats.decode_rows += int(steps) * self.config.slots
        responses = []
        for slot in np.flatnonzero(self._is_active):
            sampled = int(counts[slot])
            start = int(self._prompt_length[slot])
            new = start + sampled - int(self._num_tokens[slot])
            # The first token of a response comes out of its prefill, not out of a decode row.
            self.stats.useful_rows += new - int(self._num_tokens[slot] == start)
            self._num_tokens[slot] = start + sampled
            self._kv_length[slot] = start + sampled - 1
            if is_active[slot]:
                continue
            self._is_active[slot] = False
            response = tokens[slot, :sampled].copy()
            self._history[slot, start : start + sampled] = response
            stopped = int(response[-1]) in self.config.stop_ids
            responses.append(
                Response(
                    slot=int(slot),
                    prompt_tokens=self._history[slot, :start].copy(),
                    tokens=response,
                    logprobs=logprobs[slot, :sampled].copy(),
                    entropies=entropies[slot, :sampled].copy(),
                    version=self.version,
                    finish_reason="stop" if stopped else "length",
                )
            )
        self.stats.responses += len(responses)
        self.stats.sampled_tokens += sum(len(response.tokens) for response in responses)
        return responses

    def _prefill(self) -> None:
        """Write the pending tokens of submitted slots, grouped by padded length; the last chunk samples."""
        pending = np.flatnonzero(self._is_pending)
        longest = self.config.prefill_buckets[-1]
        remaining = {int(s): int(self._num_tokens[s] - self._kv_length[s]) for s in pending}
        while remaining:
            groups: dict[int, list[int]] = {}
            for slot, count in remaining.items():
                groups.setdefault(_bucket(min(count, longest), self.config.prefill_buckets), []).append(slot)
            for length, slots in groups.items():
                self._prefill_group(slots, length, remaining)
            remaining = {slot: count for slot, count in remaining.items() if count > 0}
        self._is_active[pending] = True
        self._is_pending[pending] = False

    def _prefill_group(self, slots: list[int], length: int, remaining: dict[int, int]) -> None:
        """One dispatch: up to ``length`` tokens of each slot. Updates ``remaining``."""
        size = _bucket(len(slots), self.config.row_buckets)
        # All slots at once need no gather: row i is slot i. Other groups are padded with rows beyond them.
        rows = np.arange(size) if size == self.config.slots else np.full(size, self.config.slots)
        if size != self.config.slots:
            rows[: len(slots)] = slots
        members = set(slots)
        tokens = np.zeros((size, length), np.int32)
        plan = np.zeros((size, 8), np.int32)  # start, count, samples?, budget, ids[4]
        for row, slot in enumerate(rows):
            if int(slot) not in members:
                continue
            count = min(length, remaining[int(slot)])
            start = int(self._kv_length[slot])
            tokens[row, :count] = self._history[slot, start : start + count]
            remaining[int(slot)] -= count
            self._kv_length[slot] += count
            budget = min(
                self.config.max_response_tokens, self.config.max_tokens - int(self._num_tokens[slot])
            )
            plan[row] = (start, count, remaining[int(slot)] == 0, budget, *self._ids[slot])
            self.stats.prefilled_tokens += count
        self._cache, self._state = self._programs.prefill(
            self._params,
            self._cache,
            self._state,
            self._key,
            rows.astype(np.int32),
            tokens,
            plan,
            self._temperature,
        )

    # -------------------------------------------------------------------------------------- cache

    @property
    def capacity(self) -> int:
        """Physical length of the cache at the moment."""
        return int(self._cache[0][0].shape[2])

    def _new_cache(self, capacity: int) -> KVCache:
        return jax.device_put(init_cache(self.model, self.config.slots, capacity), self._sharding)

    def _fit_cache(self) -> None:
        """Grow the cache to the bucket that this burst needs; start short again when nothing is held."""
        busy = self._is_active | self._is_pending
        longest = int((self._num_tokens[busy]).max()) + min(
            self.config.burst, self.config.max_response_tokens
        )
        wanted = _bucket(min(longest, self.config.max_tokens), self.config.cache_buckets)
        if not self._kv_length.any():
            if self.capacity != wanted:
                self._cache = self._new_cache(wanted)
        elif wanted > self.capacity:
            self._cache = self._programs.grow(self._cache, wanted)

    def warm_up(self) -> None:
        """Compile every bucket before the first episode, so that nothing compiles later.

        Raises:
          RuntimeError: called while conversations are live, or before `load`.
        """
        if self.has_work or self._kv_length.any() or self._params is None:
            raise RuntimeError("Engine.warm_up needs loaded weights and no live conversation")
        for capacity in self.config.cache_buckets:
            self._cache = self._new_cache(capacity)
            for rows in self.config.row_buckets:
                index = np.full(rows, self.config.slots, np.int32)
                plan = np.zeros((rows, 8), np.int32)
                for length in self.config.prefill_buckets:
                    tokens = np.zeros((rows, length), np.int32)
                    self._cache, self._state = self._programs.prefill(
                        self._params,
                        self._cache,
                        self._state,
                        self._key,
                        index,
                        tokens,
                        plan,
                        self._temperature,
                    )
            self._cache, self._state, _ = self._programs.decode(
                self._params, self._cache, self._state, self._temperature
            )
            for larger in self.config.cache_buckets:
                if larger > capacity:
                    jax.block_until_ready(self._programs.grow(self._new_cache(capacity), larger))
        self._cache = self._new_cache(self.config.cache_buckets[0])


def _bucket(size: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds ``size``."""
    return next(bucket for bucket in buckets if bucket >= size)
