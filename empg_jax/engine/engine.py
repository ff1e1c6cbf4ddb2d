"""The sampling engine: slots, prefill, decode, and a KV cache that is kept across turns.

A slot holds one conversation. `Engine.submit` appends tokens to it (or starts it afresh) and asks for a
response; `Engine.step` runs one burst for every slot at once and returns the responses that ended. Only the
new tokens of a conversation are prefilled. The host reads from the device once per burst, never per token,
and where responses are long the device has its next burst before the host reads the last one.

The cache is physically short and grows in buckets between dispatches, because unused capacity costs time in
every decode step. All shapes come from small bucket lists that `Engine.warm_up` compiles beforehand.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from empg_jax.engine.programs import Burst, Chunk, Request, cache_sharding, compile_programs
from empg_jax.engine.programs import EngineConfig as EngineConfig
from empg_jax.engine.slots import Dispatched, Slots
from empg_jax.engine.slots import Response as Response
from empg_jax.models.axes import param_shardings
from empg_jax.models.decoder import DecoderConfig, KVCache, init_cache
from empg_jax.models.lora import combine
from empg_jax.parallel.arrays import is_here, move_in_pieces
from empg_jax.parallel.mesh import make_mesh, replicated
from empg_jax.types import Params

# What belongs to the conversations of one user of an engine.
_OWN = ("_slots", "_carried", "_dispatched", "_ended", "_params", "version", "temperature", "stats")
STALE_PROBES = 4  # conversations that `Engine.measure_stale_gap` prefills again


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
        self.temperature = temperature
        self.version = -1
        self.stats = EngineStats()
        self._mesh = mesh or make_mesh(devices=jax.local_devices())
        self._key = jax.device_put(jax.random.key(seed), replicated(self._mesh))
        self.base: Params = {}  # frozen weights below the adapters that `load` brings; made by `place`
        self._params: Params | None = None
        platform = self._mesh.devices.flat[0].platform
        self._goes_ahead = platform != "cpu" if config.ahead is None else config.ahead
        self._programs = compile_programs(model, config, self._mesh)
        self._slots = Slots(config, temperature)
        self._carried = jax.device_put(np.zeros((config.slots, 4), np.int32), replicated(self._mesh))
        self._dispatched: Dispatched | None = None
        self._ended: list[Response] = []  # found outside `step`, which returns them
        self._cache: KVCache | None = self._new_cache(config.cache_buckets[0])

    # ------------------------------------------------------------------------------ conversations

    @property
    def has_work(self) -> bool:
        """True while a submitted response is unfinished, or finished and not returned."""
        return bool(self._slots.allowed.any() or self._ended)

    def room(self, slot: int, num_new: int, *, is_fresh: bool) -> int:
        """Return how many response tokens still fit after ``num_new`` more prompt tokens (may be <= 0)."""
        return self._slots.room(slot, num_new, is_fresh=is_fresh)

    def submit(
        self,
        slot: int,
        tokens: Sequence[int] | np.ndarray,
        *,
        is_fresh: bool,
        ids: tuple[int, int, int, int],
        max_response: int | None = None,
        temperature: float | None = None,
    ) -> None:
        """Append ``tokens`` to the slot's conversation and ask for a response.

        Args:
          slot: which conversation.
          tokens: prompt tokens to append to the tokens that the conversation already holds.
          is_fresh: forget the conversation first; ``tokens`` is then the whole prompt.
          ids: (stream, group, member, turn); the sampling keys are folded from these numbers.
          max_response: upper bound on this response's tokens; None uses all the room that is left.
          temperature: of this response, as in the constructor; None uses the engine's.

        Raises:
          RuntimeError: no weights are loaded, or the slot is still answering.
          ValueError: the prompt is empty, or not even one response token fits.
        """
        if self._params is None:
            raise RuntimeError("Engine.submit before Engine.load: there are no weights to sample from")
        temperature = self.temperature if temperature is None else temperature
        self._slots.begin(
            slot, tokens, is_fresh=is_fresh, ids=ids, max_response=max_response, temperature=temperature
        )
        self._leave(slot)

    def progress(self, slot: int) -> Response:
        """Return what the slot's response holds so far, with finish reason ``length``; it goes on."""
        return self._slots.read(slot, "length")

    def cut(self, slot: int, length: int) -> None:
        """Keep the conversation's first ``length`` tokens and their KV; a response in progress is dropped.

        Raises:
          ValueError: the conversation is shorter.
        """
        self._slots.cut(slot, length)
        self._leave(slot)

    def release(self, slot: int) -> None:
        """Forget the slot's conversation; a response in progress is dropped."""
        self.cut(slot, 0)

    def _leave(self, slot: int) -> None:
        """What the device samples for the slot's former response no longer counts."""
        if self._dispatched is not None:
            self._dispatched.keep(np.arange(self.config.slots) != slot)
        self._ended = [response for response in self._ended if response.slot != slot]

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
        self._ended += self._take()
        self._slots.kv_length[:] = 0

    def measure_stale_gap(self) -> float | None:
        """Measure the error of going on over keys and values of older weights.

        Some responses in progress, the longest ones, are prefilled again. Their next token, drawn with the
        same random number, is compared before and after.

        Returns:
          Mean absolute difference of the token's log-probability in nats; of the entropy where another token
          was drawn. None when no response is in progress.
        """
        self._ended += self._take()
        table = self._slots
        live = np.flatnonzero((table.allowed > 0) & (table.kv_length > 0))
        probes = live[np.argsort(-table.kv_length[live], kind="stable")][:STALE_PROBES]
        if not len(probes):
            return None
        self._fit_cache()
        stale = self._peek(probes)
        table.kv_length[probes] = 0
        self._prefill()
        fresh = self._peek(probes)
        is_same = stale.tokens[0, probes] == fresh.tokens[0, probes]
        by_logprob = np.abs(stale.logprobs - fresh.logprobs)[0, probes]
        by_entropy = np.abs(stale.entropies - fresh.entropies)[0, probes]
        return float(np.where(is_same, by_logprob, by_entropy).mean())

    def free(self) -> None:
        """Give up weights and cache until weights arrive; conversations keep their tokens.

        Raises:
          RuntimeError: a response is in progress.
        """
        if self.has_work:
            raise RuntimeError("Engine.free in the middle of a turn: step the engine until has_work is False")
        self.drop_cache()
        self._params, self._cache = None, None

    @contextlib.contextmanager
    def lent(self, params: Params, version: int, *, temperature: float) -> Iterator[None]:
        """Give every slot to other conversations with these weights for a while, without a second engine.

        The own conversations go on afterwards as if nothing had been. Their keys and values stay in memory;
        without any, the others take over the cache.

        Args:
          params: stacked parameters, placed only where the engine does not hold this version.
          version: their policy version.
          temperature: of the others' responses.
        """
        own = {name: getattr(self, name) for name in _OWN}
        cache = self._cache if self._slots.kv_length.any() or self._in_flight().any() else None
        self._slots, self._dispatched, self._ended = Slots(self.config, temperature), None, []
        self.temperature, self.stats = temperature, EngineStats()
        try:
            if cache is not None:
                self._cache = None
            if self._params is None or version != self.version:
                self.load(params, version)
            yield
        finally:
            for name, value in own.items():
                setattr(self, name, value)
            if cache is not None:
                self._cache = cache

    def place(self, params: Params) -> Params:
        """Copy stacked parameters into this engine's layout and placement.

        Engines of equal model, sizes and mesh may share the copy. Parameters that are split over hosts come
        layer by layer (`move_in_pieces`).
        """
        if is_here(params):
            return self._place_piece(params)
        return move_in_pieces(params, self._place_piece)

    def _place_piece(self, params: Params) -> Params:
        moved = jax.device_put(params, param_shardings(self._mesh, params, self.model.head_dim))
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
        ended, self._ended = self._ended, []
        patience = self.config.patience if is_eager else self.config.slots
        if self._is_worth_going_ahead():
            following = self._dispatch(patience)
            ended += self._take()
            if following is not None:
                following.keep(self._slots.allowed > 0)
            self._dispatched = following
        else:
            ended += self._take()
            self._dispatched = self._dispatch(patience)
            if not self._is_worth_going_ahead():
                ended += self._take()
        return ended

    def _is_worth_going_ahead(self) -> bool:
        """Return whether the device should get its next burst before the one in flight is read.

        It is then busy while the host works. Where most responses end with the burst, the next one would do
        nothing for them, and their next turns would wait for it.
        """
        burst = self._dispatched
        return self._goes_ahead and burst is not None and 2 * burst.may_go_on.sum() > burst.members.sum()

    def _dispatch(self, patience: int) -> Dispatched | None:
        """Prefill what waits and begin a burst for every response; None where there is none."""
        table = self._slots
        if not table.allowed.any():
            return None
        self._fit_cache()
        self._prefill()
        return self._decode(table.allowed, self.config.burst, patience)

    def _decode(self, allowed: np.ndarray, steps: int, patience: int) -> Dispatched:
        """Begin a burst for the slots with tokens ``allowed``."""
        table, on_device = self._slots, self._in_flight()
        request = Request(
            self._key,
            table.plan(allowed, on_device),
            self._carried,
            np.asarray((steps, patience), np.int32),
            table.temperatures,
        )
        self._cache, self._carried, burst = self._programs.decode(self._params, self._cache, request)
        spent = np.where(on_device, self.config.burst, 0)
        return Dispatched(burst, self.version, allowed > 0, allowed > spent + steps)

    def _in_flight(self) -> np.ndarray:
        """Return bool[S]: the slots whose newest tokens the device alone knows."""
        if self._dispatched is None:
            return np.zeros(self.config.slots, bool)
        return self._dispatched.members

    def _peek(self, slots: np.ndarray) -> Burst:
        """Sample the next token of some slots; their responses do not get it."""
        allowed = np.zeros_like(self._slots.allowed)
        allowed[slots] = 1
        return jax.device_get(self._decode(allowed, 1, self.config.slots).burst)

    def _take(self) -> list[Response]:
        """Read the burst in flight and record its tokens; return the responses that ended."""
        done, self._dispatched = self._dispatched, None
        if done is None:
            return []
        burst = jax.device_get(done.burst)  # the only read of the burst
        counts = np.where(done.members, burst.counts, 0)
        ended = self._slots.record(burst, counts, done.version)
        self.stats.bursts += 1
        self.stats.decode_rows += int(burst.steps) * self.config.slots
        self.stats.sampled_tokens += int(counts.sum())
        self.stats.responses += len(ended)
        return ended

    def _prefill(self) -> None:
        """Cache every uncached token, except the newest, of the conversations that await a response."""
        missing = self._slots.missing()
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
        table, is_whole = self._slots, size == self.config.slots
        rows = np.arange(size, dtype=np.int32) if is_whole else np.full(size, self.config.slots, np.int32)
        places = slots if is_whole else range(len(slots))
        tokens = np.zeros((size, length), np.int32)
        spans = np.zeros((size, 2), np.int32)
        for row, slot in zip(places, slots, strict=True):
            start, count = int(table.kv_length[slot]), min(length, int(missing[slot]))
            rows[row] = slot
            tokens[row, :count] = table.tokens(slot, start, start + count)
            spans[row] = start, count
            table.kv_length[slot] += count
            missing[slot] -= count
        self.stats.prefilled_tokens += int(spans[:, 1].sum())
        self._cache = self._programs.prefill(self._params, self._cache, Chunk(rows, tokens, spans))

    # -------------------------------------------------------------------------------------- cache

    @property
    def capacity(self) -> int:
        """Current physical length of the cache, in tokens."""
        return 0 if self._cache is None else int(self._cache[0][0].shape[2])

    def _new_cache(self, capacity: int) -> KVCache:
        layout = self._programs.layout
        cache = init_cache(layout, self.config.slots, capacity)
        return jax.device_put(cache, cache_sharding(self._mesh, layout, self.config))

    def _fit_cache(self) -> None:
        """Grow the cache to the bucket that this burst needs; start with a fresh one when it is empty."""
        table, burst = self._slots, self.config.burst
        busy, in_flight = table.allowed > 0, self._in_flight()
        more = np.minimum(table.allowed, np.where(in_flight, 2 * burst, burst))
        longest = int((table.num_tokens + more)[busy].max())
        # The largest bucket is max_tokens, and `submit` admits nothing longer: a bucket is always found.
        wanted = next(n for n in self.config.cache_buckets if n >= longest)
        if not (table.kv_length.any() or in_flight.any()):
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
        if self.has_work or self._slots.kv_length.any() or self._params is None:
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
            request = Request(self._key, plan, self._carried, limits, self._slots.temperatures)
            cache, _, _ = self._programs.decode(self._params, cache, request)
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
