"""The sampling engine: slots, prefill, decode, and a KV cache that is kept across turns.

A slot holds one conversation. `Engine.submit` appends tokens to it (or starts it afresh) and asks for a
response; `Engine.step` runs one burst for every slot at once and returns the responses that ended. Only the
new tokens of a conversation are prefilled. The host reads from the device once per burst, never per token.

The cache is physically short and grows in buckets between dispatches, because unused capacity costs time in
every decode step. All shapes come from small bucket lists that `Engine.warm_up` compiles beforehand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from empg_jax.engine.programs import Burst, Chunk, Request, cache_sharding, compile_programs
from empg_jax.engine.programs import EngineConfig as EngineConfig
from empg_jax.models.axes import param_shardings
from empg_jax.models.decoder import DecoderConfig, KVCache, init_cache
from empg_jax.models.lora import combine
from empg_jax.parallel.arrays import to_local
from empg_jax.parallel.mesh import make_mesh, replicated
from empg_jax.types import Params

STALE_PROBES = 4  # conversations that `Engine.measure_stale_gap` prefills again


@dataclasses.dataclass(frozen=True, slots=True)
class Response:
    """One finished response, fields as in `types.Turn`; ``versions`` int32[R] is that of every token."""

    slot: int
    prompt_tokens: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    versions: np.ndarray
    finish_reason: str


@dataclasses.dataclass
class EngineStats:
    """Counts of work done, for metrics and benchmarks."""

    prefilled_tokens: int = 0  # real tokens written by prefill
    sampled_tokens: int = 0
    responses: int = 0
    decode_rows: int = 0  # slots x steps that decode dispatches spent; sampled_tokens of them were of use
    bursts: int = 0

    @property
    def occupancy(self) -> float:
        """Share of the decoded rows that sampled a token of a response."""
        return self.sampled_tokens / max(1, self.decode_rows)


class Engine:
    """Continuous batching over slots, with each conversation's KV kept across turns.

    The cache holds every token of a conversation except the newest one. The next decode step reads that token
    and samples its successor.

    Args:
      model: the decoder's config.
      config: sizes and sampling settings.
      seed: run seed; keys are folded from (seed, stream, group, member, turn, position).
      temperature: divides the logits; statistics are recorded at this temperature. 0 is greedy decoding, with
        statistics at temperature 1.
      mesh: devices of this host: slots are split over its ``data`` axis; heads, hidden layers and vocabulary
        over ``tensor``. Default the first local device.
    """

    def __init__(
        self,
        model: DecoderConfig,
        config: EngineConfig,
        *,
        seed: int,
        temperature: float = 1.0,
        mesh: Mesh | None = None,
    ) -> None:
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must not be negative")
        self.model, self.config = model, config
        self._temperature = np.float32(temperature)
        self.version = -1
        self.stats = EngineStats()
        self._mesh = mesh or make_mesh(devices=jax.local_devices())
        self._key = jax.device_put(jax.random.key(seed), replicated(self._mesh))
        self.base: Params = {}  # frozen weights below the adapters that `load` brings; made by `place`
        self._params: Params | None = None
        # One wide product saves launches on accelerators; a CPU loses 4 % by splitting its result again. Over
        # ``tensor`` a fused matrix would be cut in the wrong places, and adapters belong to single matrices.
        platform = self._mesh.devices.flat[0].platform
        is_fused = platform != "cpu" and model.lora is None and self._mesh.shape["tensor"] == 1
        layout = dataclasses.replace(model, fused_projections=is_fused)
        self._programs = compile_programs(layout, config, self._mesh)
        slots, response = config.slots, config.max_response_tokens
        self._history = np.zeros((slots, config.max_tokens), np.int32)
        self._num_tokens = np.zeros(slots, np.int64)  # tokens of the conversation
        self._kv_length = np.zeros(slots, np.int64)  # of these, tokens whose keys are in the cache
        self._prompt_length = np.zeros(slots, np.int64)
        self._allowed = np.zeros(slots, np.int64)  # tokens that the response may still get; 0: no response
        self._ids = np.zeros((slots, 4), np.int32)
        self._logprobs = np.zeros((slots, response), np.float32)
        self._entropies = np.zeros((slots, response), np.float32)
        self._versions = np.zeros((slots, response), np.int32)
        self._cache = self._new_cache(config.cache_buckets[0])

    # ------------------------------------------------------------------------------ conversations

    @property
    def has_work(self) -> bool:
        """True while a submitted response is unfinished."""
        return bool(self._allowed.any())

    def room(self, slot: int, num_new: int, *, is_fresh: bool) -> int:
        """Return how many response tokens still fit after ``num_new`` more prompt tokens (may be <= 0)."""
        used = 0 if is_fresh else int(self._num_tokens[slot])
        return min(self.config.max_response_tokens, self.config.max_tokens - used - num_new)

    def submit(
        self,
        slot: int,
        tokens: Sequence[int] | np.ndarray,
        *,
        is_fresh: bool,
        ids: tuple[int, int, int, int],
        max_response: int | None = None,
    ) -> None:
        """Append ``tokens`` to the slot's conversation and ask for a response.

        Args:
          slot: which conversation.
          tokens: prompt tokens to append to the tokens that the conversation already holds.
          is_fresh: forget the conversation first; ``tokens`` is then the whole prompt.
          ids: (stream, group, member, turn); the sampling keys are folded from these numbers.
          max_response: upper bound on this response's tokens; None uses all the room that is left.

        Raises:
          RuntimeError: no weights are loaded, or the slot is still answering.
          ValueError: the prompt is empty, or not even one response token fits.
        """
        if self._params is None:
            raise RuntimeError("Engine.submit before Engine.load: there are no weights to sample from")
        if self._allowed[slot]:
            raise RuntimeError(f"slot {slot} is still answering")
        room = self.room(slot, len(tokens), is_fresh=is_fresh)
        allowed = room if max_response is None else min(room, max_response)
        if allowed < 1:
            raise ValueError(
                f"slot {slot}: {len(tokens)} new tokens leave no room for a response within "
                f"max_tokens={self.config.max_tokens}"
                if room < 1
                else f"slot {slot}: max_response={max_response} must be at least 1"
            )
        start = 0 if is_fresh else int(self._num_tokens[slot])
        if start + len(tokens) == 0:
            raise ValueError(f"slot {slot}: an empty prompt cannot be answered")
        if is_fresh:
            self._kv_length[slot] = 0
        self._history[slot, start : start + len(tokens)] = tokens
        self._num_tokens[slot] = self._prompt_length[slot] = start + len(tokens)
        self._ids[slot] = ids
        self._allowed[slot] = allowed

    def release(self, slot: int) -> None:
        """Forget the slot's conversation; a response in progress is dropped."""
        self._num_tokens[slot] = self._kv_length[slot] = self._allowed[slot] = 0

    def load(self, params: Params, version: int) -> None:
        """Make new weights live; return when they are in place.

        Called at a turn boundary. The KV of live conversations is dropped: each is prefilled again, with
        the new weights, when it goes on.

        Args:
          params: stacked parameters, on any devices; only the adapters where a `base` is set.
          version: policy version of these weights.

        Raises:
          RuntimeError: a response is in progress.
        """
        self.swap(self.place(params), version)

    def swap(self, placed: Params, version: int, *, keep_cache: bool = False) -> None:
        """Make weights live that `place` has put on this engine's devices; otherwise as `load`.

        Args:
          placed: the weights.
          version: their policy version.
          keep_cache: conversations and responses in progress go on over the keys and values that older
            weights computed; `measure_stale_gap` tells what that costs.

        Raises:
          RuntimeError: a response is in progress and ``keep_cache`` is False.
        """
        if self.has_work and not keep_cache:
            raise RuntimeError("Engine.swap in the middle of a turn: step the engine until has_work is False")
        self._params = combine(self.base, placed)
        self.version = version
        if not keep_cache:
            self.drop_cache()

    def drop_cache(self) -> None:
        """Forget all keys and values: each conversation is prefilled again when it goes on."""
        self._kv_length[:] = 0

    def measure_stale_gap(self) -> float | None:
        """Measure the error of going on over keys and values of older weights.

        Some responses in progress, the longest ones, are prefilled again. Their next token, drawn with the
        same random number, is compared before and after.

        Returns:
          Mean absolute difference of the token's log-probability in nats; of the entropy where another token
          was drawn. None when no response is in progress.
        """
        live = np.flatnonzero((self._allowed > 0) & (self._kv_length > 0))
        probes = live[np.argsort(-self._kv_length[live], kind="stable")][:STALE_PROBES]
        if not len(probes):
            return None
        self._fit_cache()
        stale = self._peek(probes)
        self._kv_length[probes] = 0
        self._prefill()
        fresh = self._peek(probes)
        is_same = stale.tokens[0, probes] == fresh.tokens[0, probes]
        by_logprob = np.abs(stale.logprobs - fresh.logprobs)[0, probes]
        by_entropy = np.abs(stale.entropies - fresh.entropies)[0, probes]
        return float(np.where(is_same, by_logprob, by_entropy).mean())

    def place(self, params: Params) -> Params:
        """Copy stacked parameters into this engine's layout and placement.

        Engines of equal model, sizes and mesh may share the copy.
        """
        moved = to_local(params, param_shardings(self._mesh, params, self.model.head_dim))
        return jax.block_until_ready(self._programs.unstack(moved))

    def take_stats(self) -> EngineStats:
        """Return the counts since the last call, and reset them to zero."""
        stats, self.stats = self.stats, EngineStats()
        return stats

    # ------------------------------------------------------------------------------------ running

    def step(self, *, is_eager: bool = True) -> list[Response]:
        """Prefill the submitted prompts, decode one burst, and return the responses that ended.

        Args:
          is_eager: end the burst early once ``patience`` responses have ended, so that their environments can
            go on. Pass False where no environment waits.
        """
        if not self.has_work:
            return []
        self._fit_cache()
        self._prefill()
        patience = self.config.patience if is_eager else self.config.slots
        return self._take(self._decode(self._allowed, self.config.burst, patience))

    def _decode(self, allowed: np.ndarray, steps: int, patience: int) -> Burst:
        """Decode a burst for the slots with tokens ``allowed``; record nothing."""
        slots = self.config.slots
        last = np.maximum(self._num_tokens - 1, 0)
        plan = np.empty((slots, 8), np.int32)
        plan[:, 0] = self._history[np.arange(slots), last]
        plan[:, 1] = last
        plan[:, 2] = self._num_tokens - self._prompt_length
        plan[:, 3] = allowed
        plan[:, 4:] = self._ids
        limits = np.asarray((steps, patience), np.int32)
        self._cache, burst = self._programs.decode(
            self._params, self._cache, Request(self._key, plan, limits, self._temperature)
        )
        return jax.device_get(burst)  # the only read of the burst

    def _peek(self, slots: np.ndarray) -> Burst:
        """Sample the next token of some slots; their responses do not get it."""
        allowed = np.zeros_like(self._allowed)
        allowed[slots] = 1
        return self._decode(allowed, 1, self.config.slots)

    def _take(self, burst: Burst) -> list[Response]:
        """Record the sampled tokens of a burst; return the responses that ended."""
        counts = np.asarray(burst.counts)
        self.stats.bursts += 1
        self.stats.decode_rows += int(burst.steps) * self.config.slots
        self.stats.sampled_tokens += int(counts.sum())
        step, slot = np.nonzero(np.arange(self.config.burst)[:, None] < counts[None, :])
        # One scatter for all slots, since this runs on the host after every burst.
        column = self._num_tokens[slot] + step
        self._history[slot, column] = burst.tokens[step, slot]
        column -= self._prompt_length[slot]
        self._logprobs[slot, column] = burst.logprobs[step, slot]
        self._entropies[slot, column] = burst.entropies[step, slot]
        self._versions[slot, column] = self.version
        sampled = np.flatnonzero(counts)
        self._num_tokens[sampled] += counts[sampled]
        # The newest token has no keys yet: the next decode step computes them.
        self._kv_length[sampled] = self._num_tokens[sampled] - 1
        self._allowed[sampled] -= counts[sampled]
        # Decoding halts a slot at its stop token, so only its last token can be one.
        stopped = np.isin(burst.tokens[counts[sampled] - 1, sampled], self.config.stop_ids)
        ended = [
            self._respond(int(slot), bool(is_stop))
            for slot, is_stop in zip(sampled, stopped, strict=True)
            if is_stop or not self._allowed[slot]
        ]
        self.stats.responses += len(ended)
        return ended

    def _respond(self, slot: int, is_stop: bool) -> Response:
        self._allowed[slot] = 0
        start, stop = int(self._prompt_length[slot]), int(self._num_tokens[slot])
        return Response(
            slot=slot,
            prompt_tokens=self._history[slot, :start].copy(),
            tokens=self._history[slot, start:stop].copy(),
            logprobs=self._logprobs[slot, : stop - start].copy(),
            entropies=self._entropies[slot, : stop - start].copy(),
            versions=self._versions[slot, : stop - start].copy(),
            finish_reason="stop" if is_stop else "length",
        )

    def _prefill(self) -> None:
        """Cache every uncached token, except the newest, of the conversations that await a response."""
        missing = np.where(self._allowed > 0, self._num_tokens - 1 - self._kv_length, 0)
        lengths = self.config.prefill_lengths(self.capacity)
        while missing.any():
            groups: dict[int, list[int]] = {}
            for slot in np.flatnonzero(missing):
                groups.setdefault(_fit(int(missing[slot]), lengths), []).append(int(slot))
            for length, slots in groups.items():
                sizes = self.config.prefill_rows(length)
                while slots:
                    size = _fit(len(slots), sizes)
                    self._prefill_group(slots[:size], size, length, missing)
                    del slots[:size]

    def _prefill_group(self, slots: list[int], size: int, length: int, missing: np.ndarray) -> None:
        """Prefill up to ``length`` tokens of each slot by a dispatch of ``size`` rows; lower ``missing``."""
        # All slots at once need no gather: row i is slot i. Other groups are padded with rows beyond them.
        is_whole = size == self.config.slots
        rows = np.arange(size, dtype=np.int32) if is_whole else np.full(size, self.config.slots, np.int32)
        places = slots if is_whole else range(len(slots))
        tokens = np.zeros((size, length), np.int32)
        spans = np.zeros((size, 2), np.int32)
        for row, slot in zip(places, slots, strict=True):
            start, count = int(self._kv_length[slot]), min(length, int(missing[slot]))
            rows[row] = slot
            tokens[row, :count] = self._history[slot, start : start + count]
            spans[row] = start, count
            self._kv_length[slot] += count
            missing[slot] -= count
        self.stats.prefilled_tokens += int(spans[:, 1].sum())
        self._cache = self._programs.prefill(self._params, self._cache, Chunk(rows, tokens, spans))

    # -------------------------------------------------------------------------------------- cache

    @property
    def capacity(self) -> int:
        """Current physical length of the cache, in tokens."""
        return int(self._cache[0][0].shape[2])

    def _new_cache(self, capacity: int) -> KVCache:
        cache = init_cache(self.model, self.config.slots, capacity)
        return jax.device_put(cache, cache_sharding(self._mesh, self.model, self.config))

    def _fit_cache(self) -> None:
        """Grow the cache to the bucket that this burst needs; start with a fresh one when it is empty."""
        busy = self._allowed > 0
        longest = int((self._num_tokens + np.minimum(self._allowed, self.config.burst))[busy].max())
        # The largest bucket is max_tokens, and `submit` admits nothing longer: a bucket is always found.
        wanted = next(n for n in self.config.cache_buckets if n >= longest)
        if not self._kv_length.any():
            if self.capacity != wanted:
                self._cache = self._new_cache(wanted)
            return
        # One bucket at a time: `warm_up` compiled the growth from each bucket to the next one only.
        for capacity in self.config.cache_buckets:
            if self.capacity < capacity <= wanted:
                self._cache = self._programs.grow(self._cache, capacity)

    @property
    def num_warm_ups(self) -> int:
        """The number of programs of `warm_up`, which is how often it calls ``check``."""
        config = self.config
        return sum(
            1 + sum(len(config.prefill_rows(length)) for length in config.prefill_lengths(capacity))
            for capacity in config.cache_buckets
        )

    def warm_up(self, check: Callable[[], None] = lambda: None) -> None:
        """Compile every bucket before the first episode, so that nothing compiles later.

        Args:
          check: called before each program; it may raise to end the warm-up.

        Raises:
          RuntimeError: called while conversations are live, or before `load`.
        """
        config = self.config
        if self.has_work or self._kv_length.any() or self._params is None:
            raise RuntimeError("Engine.warm_up needs loaded weights and no live conversation")
        for capacity, larger in zip(config.cache_buckets, (*config.cache_buckets[1:], 0), strict=True):
            cache = self._new_cache(capacity)
            for length in config.prefill_lengths(capacity):
                for rows in config.prefill_rows(length):
                    check()
                    # All spans are empty: the dispatch compiles the program and writes nothing.
                    index = np.full(rows, config.slots, np.int32)
                    tokens, spans = np.zeros((rows, length), np.int32), np.zeros((rows, 2), np.int32)
                    cache = self._programs.prefill(self._params, cache, Chunk(index, tokens, spans))
            check()
            plan, limits = np.zeros((config.slots, 8), np.int32), np.zeros(2, np.int32)
            request = Request(self._key, plan, limits, self._temperature)
            cache, _ = self._programs.decode(self._params, cache, request)
            if larger:
                jax.block_until_ready(self._programs.grow(cache, larger))
        self._cache = self._new_cache(config.cache_buckets[0])


def _fit(size: int, buckets: tuple[int, ...]) -> int:
    """Return the smallest bucket that holds ``size``, unless half of it or more would be padding.

    In that case, and where no bucket is large enough, return the next smaller bucket, if there is one: it is
    filled completely, and the next dispatch takes the rest.
    """
    above = next((bucket for bucket in buckets if bucket >= size), None)
    below = max((bucket for bucket in buckets if bucket < size), default=None)
    if above is not None and (below is None or 2 * size > above):
        return above
    assert below is not None
    return below
