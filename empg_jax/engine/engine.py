"""The sampling engine: slots, prefill, decode, and a KV cache that is kept across turns.

A slot holds one conversation. `Engine.submit` appends tokens to it (or starts it afresh) and asks for a
response; `Engine.step` runs one burst for every slot at once and returns the responses that ended. Only the
new tokens of a conversation are prefilled. The host reads from the device once per burst, never per token,
and where responses are long the device has its next burst before the host reads the last one.

The cache is physically short and grows in buckets between dispatches, because unused capacity costs time in
every step; or it is a pool of pages. All shapes come from small bucket lists that `Engine.warm_up` compiles.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from empg_jax.engine.inflight import Dispatched
from empg_jax.engine.paged import make_memory
from empg_jax.engine.programs import Burst, compile_programs
from empg_jax.engine.sizes import EngineConfig as EngineConfig
from empg_jax.engine.slots import Response as Response
from empg_jax.engine.slots import Slots, check_ids
from empg_jax.engine.slots import Watch as Watch
from empg_jax.engine.stats import EngineStats as EngineStats
from empg_jax.engine.stats import compare_tokens
from empg_jax.engine.warmup import call_all
from empg_jax.engine.weights import place_params
from empg_jax.models.decoder import DecoderConfig
from empg_jax.models.filtering import NO_FILTER, TokenFilter
from empg_jax.models.lora import combine
from empg_jax.parallel.ahead import warm_up
from empg_jax.parallel.mesh import make_mesh, replicated
from empg_jax.types import Params

# What belongs to the conversations of one user of an engine.
_SAMPLING = ("_params", "version", "temperature", "token_filter")
_OWN = ("_slots", "_memory", "_carried", "_dispatched", "_ended", "stats", *_SAMPLING)


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
      token_filter: restricts sampling to likely tokens (top-k, top-p, min-p); needs ``config.has_filter``.
        Log-probabilities are then those of the filtered distribution, which the tokens are drawn from;
        entropies stay those of the whole distribution.
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
        token_filter: TokenFilter = NO_FILTER,
        mesh: Mesh | None = None,
    ) -> None:
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must not be negative")
        self._mesh = mesh or make_mesh(devices=jax.local_devices())
        self.model, self.config = model, (config := config.split_over(self._mesh.shape["data"]))
        self.temperature, self.token_filter = temperature, token_filter
        config.check_filter(token_filter, model.vocab_size)
        self.version, self.stats = -1, EngineStats()
        self._key = jax.device_put(jax.random.key(seed), replicated(self._mesh))
        self.base: Params = {}  # frozen weights below the adapters that `load` brings; made by `place`
        self._params: Params | None = None
        is_cpu = self._mesh.devices.flat[0].platform == "cpu"
        self._goes_ahead = not is_cpu if config.ahead is None else config.ahead
        self._programs = compile_programs(model, config, self._mesh)
        self._slots = Slots(config, temperature, token_filter)
        self._carried = jax.device_put(np.zeros((config.slots, 4), np.int32), replicated(self._mesh))
        self._dispatched = Dispatched.nothing(config)
        self._ended: list[Response] = []  # found outside `step`, which returns them
        self._memory = make_memory(self._programs, config)

    # ------------------------------------------------------------------------------ conversations

    @property
    def has_work(self) -> bool:
        """True while a submitted response is unfinished, or finished and not returned."""
        return bool(self._slots.allowed.any() or self._ended)

    def room(self, slot: int, num_new: int, *, is_fresh: bool) -> int:
        """Return how many response tokens still fit after ``num_new`` more prompt tokens (may be <= 0)."""
        return self.config.room(0 if is_fresh else int(self._slots.num_tokens[slot]), num_new)

    def submit(
        self,
        slot: int,
        tokens: Sequence[int] | np.ndarray,
        *,
        is_fresh: bool,
        ids: tuple[int, int, int, int],
        max_response: int | None = None,
        temperature: float | None = None,
        token_filter: TokenFilter | None = None,
        watch: Watch | None = None,
    ) -> None:
        """Append ``tokens`` to the slot's conversation and ask for a response.

        Args:
          slot: which conversation.
          tokens: prompt tokens to append to the tokens that the conversation already holds.
          is_fresh: forget the conversation first; ``tokens`` is then the whole prompt.
          ids: (stream, group, member, turn); the sampling keys are folded from these numbers.
          max_response: upper bound on this response's tokens; None uses all the room that is left.
          temperature: of this response, as in the constructor; None uses the engine's.
          token_filter: of this response, as in the constructor; None uses the engine's.
          watch: asked after every burst whether the response ends, for what no single token tells, such as a
            stop string. The tokens behind the end are dropped, so the burst's length does not matter.

        Raises:
          RuntimeError: no weights are loaded, or the slot is still answering.
          ValueError: the prompt is empty, leaves no room or has other tokens; or the filter is not possible.
        """
        if self._params is None:
            raise RuntimeError("Engine.submit before Engine.load: there are no weights to sample from")
        token_filter = self.token_filter if token_filter is None else token_filter
        self.config.check_filter(token_filter, self.model.vocab_size)
        check_ids(slot, tokens, self.model.vocab_size)
        self.stats.evicted_tokens += self._slots.begin(
            slot,
            tokens,
            is_fresh=is_fresh,
            ids=ids,
            max_response=max_response,
            temperature=self.temperature if temperature is None else temperature,
            token_filter=token_filter,
            watch=watch,
        )
        self.stats.prompt_tokens += int(self._slots.num_tokens[slot]) - 1
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
        self._dispatched.leave(slot)
        self._ended = self._ended and [response for response in self._ended if response.slot != slot]
        if self._is_empty:
            self._slots.drop()

    @property
    def _is_empty(self) -> bool:
        """Whether no conversation has keys in the cache: it may become shorter, and be lent.

        Rows of released slots then count no more: whether a lending came before their use is the clock's.
        """
        return self._slots.is_empty and not self._dispatched.members.any()

    def load(self, params: Params, version: int) -> None:
        """Make new weights live at a turn boundary; return when they are in place.

        The KV of live conversations is dropped: each is prefilled again when it goes on.

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
        if keep_cache:
            self._slots.age(self._dispatched.members)
        else:
            self.drop_cache()

    def drop_cache(self) -> None:
        """Forget all keys and values: each conversation is prefilled again when it goes on."""
        self._ended += self._take()
        self._slots.drop()
        # What no conversation reads any more has weight 0 in attention, but 0 times NaN is NaN.
        self._memory.cache = None

    def measure_stale_gap(self) -> float | None:
        """Measure the error of going on over keys and values of older weights.

        Some responses in progress, the longest ones, are prefilled again. Their next token, drawn with the
        same random number, is compared before and after.

        Returns:
          Mean absolute difference of the token's log-probability in nats; of the entropy where another token
          was drawn. None when no response is in progress.
        """
        self._ended += self._take()
        probes = self._slots.find_probes()
        if not len(probes):
            return None
        self._memory.fit(self._slots, self._dispatched.members, is_empty=self._is_empty)
        stale, probes = self._peek(probes)
        self._slots.drop(probes)
        self._memory.fill(self._params, self._slots, self.stats)
        fresh, probes = self._peek(probes)
        return compare_tokens(stale, fresh, probes) if len(probes) else None

    def free(self) -> None:
        """Give up weights and cache until weights arrive; conversations keep their tokens.

        Raises:
          RuntimeError: a response is in progress.
        """
        if self.has_work:
            raise RuntimeError("Engine.free in the middle of a turn: step the engine until has_work is False")
        self.drop_cache()
        self._params = None

    @contextlib.contextmanager
    def lent(
        self,
        placed: Params,
        version: int,
        *,
        temperature: float,
        token_filter: TokenFilter = NO_FILTER,
    ) -> Iterator[None]:
        """Give every slot to other conversations with these weights for a while, without a second engine.

        The own conversations go on afterwards as if nothing had been. Their keys and values stay in memory;
        without any, the others take the cache.

        Args:
          placed: the weights, of `place`; left aside where the engine holds this version.
          version: their policy version.
          temperature: of the others' responses.
          token_filter: of the others' responses.
        """
        self.config.check_filter(token_filter, self.model.vocab_size)
        own = {name: getattr(self, name) for name in _OWN}
        self._memory = self._memory.lend(is_empty=self._is_empty)
        self._slots, self._ended = Slots(self.config, temperature, token_filter), []
        self._dispatched = Dispatched.nothing(self.config)
        self.temperature, self.token_filter, self.stats = temperature, token_filter, EngineStats()
        try:
            if self._params is None or version != self.version:
                self.swap(placed, version)
            yield
        finally:
            for name, value in own.items():
                setattr(self, name, value)

    def place(self, params: Params) -> Params:
        """Copy stacked parameters into this engine's layout and placement.

        Engines of equal model, sizes and mesh may share the copy.
        """
        return place_params(params, self._programs, self._mesh)

    def take_stats(self) -> EngineStats:
        """Return the counts since the last call, and reset them to zero."""
        stats, self.stats = self.stats, EngineStats()
        return stats

    # ------------------------------------------------------------------------------------ running

    def step(self, *, is_eager: bool = True) -> list[Response]:
        """Prefill submitted prompts, decode one burst, and return the responses that ended.

        A step writes at most ``EngineConfig.prefill_chunk`` tokens of a prompt into the cache, so that the
        other responses go on beside a long one.

        Args:
          is_eager: end the burst early once ``patience`` responses have ended, so that their environments can
            go on. Pass False where no environment waits.
        """
        ended, self._ended = self._ended, []
        patience = self.config.patience if is_eager else self.config.slots
        # The device is then busy while the host reads what it did before.
        if self._goes_ahead and self._dispatched.mostly_goes_on and not self._memory.is_pressed:
            following = self._dispatch(patience)
            ended += self._take()
            following.keep(self._slots.allowed > 0)
            self._dispatched = following
        else:
            ended += self._take()
            self._dispatched = self._dispatch(patience)
            if not (self._goes_ahead and self._dispatched.mostly_goes_on):
                ended += self._take()
        return ended

    def _dispatch(self, patience: int) -> Dispatched:
        """Prefill a chunk of what waits and begin a burst for every response whose prompt is in the cache."""
        table = self._slots
        if not table.allowed.any():
            return Dispatched.nothing(self.config)
        self._memory.fit(self._slots, self._dispatched.members, is_empty=self._is_empty)
        self._memory.fill(self._params, table, self.stats, self.config.prefill_chunk)
        ready = np.where(table.missing() > 0, 0, table.allowed)
        if not ready.any():
            # With all chunks on the device at once, a prompt that comes meanwhile would wait for them.
            jax.block_until_ready(self._memory.cache)
            return Dispatched.nothing(self.config)
        return self._decode(ready, self.config.burst, patience)

    def _decode(self, allowed: np.ndarray, steps: int, patience: int) -> Dispatched:
        """Begin a burst for the slots with tokens ``allowed``, as far as there is room for them."""
        table, memory = self._slots, self._memory
        allowed = memory.admit(table, allowed, steps)
        self.stats.add_use(*memory.take_use())
        on_device = self._dispatched.members & (allowed > 0)
        plan, limits = table.plan(allowed, on_device), np.asarray((steps, patience), np.int32)
        request = memory.locate(table.request(self._key, self._carried, plan, limits))
        memory.cache, self._carried, burst = self._programs.decode(self._params, memory.cache, request)
        spent = np.where(on_device, self.config.burst, 0)
        return Dispatched(burst, self.version, allowed > 0, allowed > spent + steps)

    def _peek(self, slots: np.ndarray) -> tuple[Burst, np.ndarray]:
        """Sample the next token of some slots for no response; return the tokens and the slots with room."""
        ready = self._slots.missing()[slots] == 0
        allowed = np.bincount(slots[ready], minlength=self.config.slots)
        done = self._decode(allowed, 1, self.config.slots)
        return jax.device_get(done.burst), slots[done.members[slots]]

    def _take(self) -> list[Response]:
        """Read the burst in flight and record its tokens; return the responses that ended."""
        done, self._dispatched = self._dispatched, Dispatched.nothing(self.config)
        if done.burst is None:
            return []
        burst = jax.device_get(done.burst)  # the only read of the burst
        counts = np.where(done.members, burst.counts, 0)
        before = int(self._slots.num_tokens.sum())
        ended = self._slots.record(burst, counts, done.version)
        self.stats.add(burst, len(counts), int(self._slots.num_tokens.sum()) - before, len(ended))
        return ended

    @property
    def capacity(self) -> int:
        """Current physical length of the cache, or of what is read of each slot's pages, in tokens."""
        return self._memory.capacity

    def warm_up(self, check: Callable[[], None] = lambda: None) -> None:
        """Compile every bucket before the first episode, so that nothing compiles later.

        Args:
          check: called for each of the ``config.num_programs`` programs; it may raise to end the warm-up.

        Raises:
          RuntimeError: called while conversations are live, or before `load`.
        """
        if self.has_work or self._slots.kv_length.any() or self._params is None:
            raise RuntimeError("Engine.warm_up needs loaded weights and no live conversation")
        nothing = np.zeros((self.config.slots, 8), np.int32), np.zeros(2, np.int32)
        request = self._slots.request(self._key, self._carried, *nothing)
        self._memory.cache = None  # a pool would be there twice
        warm_up(functools.partial(call_all, self._programs, self.config, self._params, request), check)
        self._memory = make_memory(self._programs, self.config)
