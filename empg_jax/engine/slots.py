"""The host's table of conversations: their tokens, their responses, and what the device has of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from empg_jax.engine.programs import Burst, Request
from empg_jax.engine.sizes import EngineConfig
from empg_jax.models.filtering import NO_FILTER, TokenFilter

# Given a response's tokens so far: how many of them to keep where the response ends there, else None.
Watch = Callable[[np.ndarray], int | None]

MIN_SHARED = 16  # tokens that a copy of keys and values must save: every chat begins with a few equal ones
STALE_PROBES = 4  # conversations that `Engine.measure_stale_gap` prefills again


@dataclasses.dataclass(frozen=True, slots=True)
class Response:
    """One finished response, fields as in `types.Turn`.

    ``versions`` int32[R] is that of every token. ``full_logprobs`` float32[R], log-probabilities without the
    response's filter, is there where the engine has filters; else they are ``logprobs``. The keys and values
    of the prompt's first ``copied`` tokens came from another conversation. ``failure`` tells why there is no
    response, where a server was to sample it. ``text`` is the response's text where it is not that of the
    tokens, as from an endpoint that does not tell them. ``unfit`` tells why the prompt leaves no room for a
    response, where only a server knows.
    """

    slot: int
    prompt_tokens: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    versions: np.ndarray
    finish_reason: str
    full_logprobs: np.ndarray | None = None
    copied: int = 0
    failure: str | None = None
    text: str | None = None
    unfit: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """The first ``count`` tokens' keys and values of one slot for another; ``new`` of them are missing."""

    slot: int
    donor: int
    count: int
    new: int


class Slots:
    """One row per slot.

    Attributes:
      num_tokens: int[S], tokens of the conversation.
      kv_length: int[S], of these, tokens whose keys are in the cache.
      shareable: int[S], first rows of the slot's cache that other conversations may copy: the live weights
        alone computed them, from the tokens of this table, even where the slot was cut or released since. -1
        where rows of older weights are in use.
      allowed: int[S], tokens that the response may still get; 0 where there is no response.
      copied: int[S], tokens of the response's prompt whose keys were copied from another slot.
      turns: int[S], number of the slot's newest prompt, in the order in which they came.
    """

    def __init__(
        self, config: EngineConfig, temperature: float, token_filter: TokenFilter = NO_FILTER
    ) -> None:
        self.config = config
        slots, response = config.slots, config.max_response_tokens
        self._history = np.zeros((slots, config.max_tokens), np.int32)
        self.num_tokens = np.zeros(slots, np.int64)
        self.kv_length = np.zeros(slots, np.int64)
        self.shareable = np.zeros(slots, np.int64)
        self.allowed = np.zeros(slots, np.int64)
        self.copied = np.zeros(slots, np.int64)
        self.turns = np.zeros(slots, np.int64)
        self.temperatures = np.full(slots, temperature, np.float32)
        filters = np.tile(np.asarray(token_filter, np.float32), (slots, 1))
        self.filters = filters if config.has_filter else None
        self._watches: dict[int, Watch | None] = {}
        self._prompt_length = np.zeros(slots, np.int64)
        self._ids = np.zeros((slots, 4), np.int32)
        self._logprobs = np.zeros((slots, response), np.float32)
        self._entropies = np.zeros((slots, response), np.float32)
        self._versions = np.zeros((slots, response), np.int32)
        self._full_logprobs = np.zeros((slots, response), np.float32) if config.has_filter else None

    def begin(
        self,
        slot: int,
        tokens: Sequence[int] | np.ndarray,
        *,
        is_fresh: bool,
        ids: tuple[int, int, int, int],
        max_response: int | None,
        temperature: float,
        token_filter: TokenFilter,
        watch: Watch | None,
    ) -> int:
        """Append a prompt and begin a response; see `Engine.submit`.

        Returns:
          The number of rows that others could have copied, and that this prompt replaces.
        """
        if self.allowed[slot]:
            raise RuntimeError(f"slot {slot} is still answering")
        start = 0 if is_fresh else int(self.num_tokens[slot])
        room = self.config.room(start, len(tokens))
        allowed = room if max_response is None else min(room, max_response)
        if allowed < 1:
            raise ValueError(
                f"slot {slot}: {len(tokens)} new tokens leave no room for a response within "
                f"max_tokens={self.config.max_tokens}"
                if room < 1
                else f"slot {slot}: max_response={max_response} must be at least 1"
            )
        if start + len(tokens) == 0:
            raise ValueError(f"slot {slot}: an empty prompt cannot be answered")
        if is_fresh:
            self.kv_length[slot] = 0
        given_up = self._keep(slot, start, np.asarray(tokens, np.int32))
        self._history[slot, start : start + len(tokens)] = tokens
        self.num_tokens[slot] = self._prompt_length[slot] = start + len(tokens)
        self._ids[slot], self.copied[slot] = ids, 0
        self.turns[slot] = self.turns.max() + 1
        self.temperatures[slot] = temperature
        if self.filters is not None:
            self.filters[slot] = token_filter
        self._watches[slot] = watch
        self.allowed[slot] = allowed
        return given_up

    def _keep(self, slot: int, start: int, tokens: np.ndarray) -> int:
        """Keep the rows that fit new tokens from ``start`` on; count the shareable ones that do not."""
        if not self.kv_length[slot]:
            self.shareable[slot] = max(0, int(self.shareable[slot]))  # no row of older weights is in use
        held = int(self.shareable[slot])
        if held <= start:
            return 0
        stays = start + count_equal(self._history[slot, start:held], tokens)
        self.shareable[slot] = stays
        return held - stays

    @property
    def is_empty(self) -> bool:
        """Whether no conversation has keys in the cache, or will find any that were left there."""
        return not (self.kv_length.any() or ((self.allowed > 0) & (self.shareable > 0)).any())

    def cut(self, slot: int, length: int) -> None:
        """Keep the first ``length`` tokens and their keys; see `Engine.cut`."""
        if not 0 <= length <= self.num_tokens[slot]:
            raise ValueError(f"slot {slot}: {self.num_tokens[slot]} tokens cannot be cut to {length}")
        self.allowed[slot] = 0
        self.num_tokens[slot] = length
        # The keys behind stay in memory, where no position before them looks, until they are written over.
        self.kv_length[slot] = max(0, min(int(self.kv_length[slot]), length - 1))

    def tokens(self, slot: int, start: int, stop: int) -> np.ndarray:
        """Return some tokens of the conversation."""
        return self._history[slot, start:stop]

    def missing(self) -> np.ndarray:
        """Count, by slot, the tokens that a response waits for: all without keys, but the newest."""
        return np.where(self.allowed > 0, self.num_tokens - 1 - self.kv_length, 0)

    def reuse(self) -> None:
        """Go on over rows of a slot's former conversation, as far as its prompt equals them.

        Not before the prefill: the weights may change until then.
        """
        found = (self.allowed > 0) & (self.shareable > self.kv_length)
        self.kv_length[:] = np.where(found, np.minimum(self.shareable, self.num_tokens - 1), self.kv_length)

    def take_copies(self, copies: Sequence[Copy]) -> int:
        """Note what responses copy from other conversations; return the tokens that need no prefill by it."""
        for copy in copies:
            self.copied[copy.slot] = copy.count
        return sum(copy.new for copy in copies)

    def longest(self, in_flight: np.ndarray) -> int:
        """Return the longest that a conversation can be after the next burst, beside those in flight."""
        burst = self.config.burst
        more = np.minimum(self.allowed, np.where(in_flight, 2 * burst, burst))
        return int((self.num_tokens + more)[self.allowed > 0].max())

    def find_probes(self) -> np.ndarray:
        """Find the `STALE_PROBES` responses in progress with the most tokens in the cache, if so many are.

        A prompt that is not wholly in the cache has no next token yet.
        """
        live = np.flatnonzero((self.allowed > 0) & (self.kv_length > 0) & (self.missing() == 0))
        return live[np.argsort(-self.kv_length[live], kind="stable")][:STALE_PROBES]

    def grow(self, slots: np.ndarray, lengths: np.ndarray | None = None) -> None:
        """Note the first tokens of these slots that have keys in the cache; default all but the newest."""
        is_pure = self.shareable[slots] >= self.kv_length[slots]
        self.kv_length[slots] = self.num_tokens[slots] - 1 if lengths is None else lengths
        if self.config.share_prefix:
            rows = np.maximum(self.kv_length[slots], self.shareable[slots])
            self.shareable[slots] = np.where(is_pure, rows, -1)

    def drop(self, slots: np.ndarray | slice = slice(None)) -> None:
        """Forget the keys of these slots."""
        self.kv_length[slots] = self.shareable[slots] = 0

    @property
    def rows(self) -> np.ndarray:
        """Count, by slot, the first tokens whose keys are of use to it or to others."""
        return np.maximum(self.kv_length, self.shareable)

    def by_age(self, slots: Sequence[int] | np.ndarray) -> list[int]:
        """Sort slots by their newest prompts, the oldest first."""
        return sorted(map(int, slots), key=lambda slot: int(self.turns[slot]))

    def lose(self, slot: int, rows: int) -> int:
        """Forget a slot's keys behind its first ``rows`` ones; return how many were of use."""
        before = int(self.rows[slot])
        self.kv_length[slot] = min(int(self.kv_length[slot]), rows)
        self.shareable[slot] = min(int(self.shareable[slot]), rows)
        return before - int(self.rows[slot])

    def age(self, in_flight: np.ndarray) -> None:
        """Note that all rows, also those of the slots ``in_flight``, are those of older weights."""
        self.shareable[:] = np.where((self.kv_length > 0) | in_flight, -1, 0)

    def common(self, slot: int, lengths: np.ndarray, at_least: int) -> np.ndarray:
        """Count, by slot, the first tokens that equal those of another slot that await a prefill.

        Args:
          slot: the other slot.
          lengths: int[S], most tokens to count.
          at_least: where there are fewer, the count is 0; `MIN_SHARED` or more.
        """
        tokens = self._history[slot, : self.num_tokens[slot] - 1]
        lengths = np.minimum(lengths, len(tokens))
        found = np.zeros(self.config.slots, np.int64)
        if len(tokens) < at_least:
            return found
        # Of one environment's conversations many have the same token in one column, fewer in as many as a
        # copy must save, and few all tokens.
        last, tail = at_least - 1, slice(at_least - MIN_SHARED, at_least)
        others = np.flatnonzero((lengths >= at_least) & (self._history[:, last] == tokens[last]))
        others = others[(self._history[others, tail] == tokens[tail]).all(axis=1) & (others != slot)]
        # All that are left at once, in blocks that grow.
        start, stop = 0, at_least
        while len(others):
            differs = self._history[others, start:stop] != tokens[start:stop]
            is_over = differs.any(axis=1)
            found[others] = np.where(is_over, start + differs.argmax(axis=1), stop)
            others = others[~is_over] if stop < len(tokens) else others[:0]
            start, stop = stop, min(4 * stop, len(tokens))
        return np.where(found >= at_least, np.minimum(found, lengths), 0)

    def plan(self, allowed: np.ndarray, on_device: np.ndarray) -> np.ndarray:
        """Return the rows of `Request.plan`.

        Args:
          allowed: int[S], tokens that the burst may sample.
          on_device: bool[S], slots whose state the device alone knows.
        """
        plan = np.empty((self.config.slots, 8), np.int32)
        last = np.maximum(self.num_tokens - 1, 0)
        plan[:, 0] = self._history[np.arange(self.config.slots), last]
        plan[:, 1] = last
        plan[:, 2] = self.num_tokens - self._prompt_length
        plan[:, 3] = np.where(on_device, -1, allowed)
        plan[:, 4:] = self._ids
        return plan

    def request(self, key: jax.Array, carried: jax.Array, plan: np.ndarray, limits: np.ndarray) -> Request:
        """Return the input of a decode dispatch; see `Request`."""
        return Request(key, plan, carried, limits, self.temperatures, self.filters)

    def record(self, burst: Burst, counts: np.ndarray, version: int) -> list[Response]:
        """Append the tokens of a burst, ``counts`` int[S] of each slot; return the responses that ended."""
        step, slot = np.nonzero(np.arange(self.config.burst)[:, None] < counts[None, :])
        # One scatter for all slots, since this runs on the host after every burst.
        column = self.num_tokens[slot] + step
        self._history[slot, column] = burst.tokens[step, slot]
        column -= self._prompt_length[slot]
        self._logprobs[slot, column] = burst.logprobs[step, slot]
        self._entropies[slot, column] = burst.entropies[step, slot]
        self._versions[slot, column] = version
        if self._full_logprobs is not None and burst.full_logprobs is not None:
            self._full_logprobs[slot, column] = burst.full_logprobs[step, slot]
        sampled = np.flatnonzero(counts)
        self.num_tokens[sampled] += counts[sampled]
        # The newest token has no keys yet: the next decode step computes them.
        self.grow(sampled)
        self.allowed[sampled] -= counts[sampled]
        # Decoding halts a slot at its stop token, so only its last token can be one.
        stopped = np.isin(burst.tokens[counts[sampled] - 1, sampled], self.config.stop_ids)
        ended = []
        for which, is_stop in zip(sampled.tolist(), stopped.tolist(), strict=True):
            is_over = self._look(which) or is_stop
            if is_over or not self.allowed[which]:
                self.allowed[which] = 0
                ended.append(self.read(which, "stop" if is_over else "length"))
        return ended

    def _look(self, slot: int) -> bool:
        """Ask the response's watch whether it ends; forget the tokens behind its end."""
        watch, start = self._watches.get(slot), int(self._prompt_length[slot])
        keep = None if watch is None else watch(self.tokens(slot, start, int(self.num_tokens[slot])))
        if keep is None:
            return False
        self.num_tokens[slot] = start + keep
        # The keys behind stay in memory, as in `cut`.
        self.kv_length[slot] = start + keep - 1
        return True

    def read(self, slot: int, finish_reason: str) -> Response:
        """Return the slot's response as far as it is known."""
        start, stop = int(self._prompt_length[slot]), int(self.num_tokens[slot])
        return Response(
            slot=slot,
            prompt_tokens=self._history[slot, :start].copy(),
            tokens=self._history[slot, start:stop].copy(),
            logprobs=self._logprobs[slot, : stop - start].copy(),
            entropies=self._entropies[slot, : stop - start].copy(),
            versions=self._versions[slot, : stop - start].copy(),
            finish_reason=finish_reason,
            full_logprobs=None
            if self._full_logprobs is None
            else self._full_logprobs[slot, : stop - start].copy(),
            copied=int(self.copied[slot]),
        )


def check_ids(slot: int, tokens: Sequence[int] | np.ndarray, vocab_size: int) -> None:
    """Refuse tokens beyond the vocabulary: their embeddings, and what attends to them, would be NaN."""
    ids = np.asarray(tokens)
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        wrong = ids[(ids < 0) | (ids >= vocab_size)]
        raise ValueError(f"slot {slot}: {wrong[0]} is no token id; they lie in [0, {vocab_size})")


def count_equal(first: np.ndarray, second: np.ndarray) -> int:
    """Count equal leading elements."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
