"""An engine whose tokens come from a server: slots are requests, and weights are folders."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from empg_jax.engine.sizes import EngineConfig
from empg_jax.engine.slots import Response, Watch
from empg_jax.engine.stats import EngineStats
from empg_jax.models.decoder import DecoderConfig
from empg_jax.models.filtering import NO_FILTER, TokenFilter
from empg_jax.rollout.server.answers import Ask, Failure, Sampled
from empg_jax.rollout.server.client import Client
from empg_jax.rollout.server.folders import Folders, Placed
from empg_jax.types import Params

# Seconds that a step waits for a response while environments may answer, and while none is waited for.
EAGER_SECONDS, PATIENT_SECONDS = 0.01, 1.0
_OWN = ("_conversations", "_asked", "_ended", "_wanted", "version", "temperature", "token_filter", "stats")


class ServerEngine:
    """An engine as rollouts use it (`SamplingEngine`), on a server.

    A slot's tokens are kept here, and each turn sends the whole conversation; its KV is the server's concern.

    Args:
      model: the decoder's config.
      config: sizes; its buckets mean nothing here.
      client: connected to the server.
      folders: takes published weights.
      seed: of the run; a response's seed is made of it and of the sampling ids.
      temperature: as of `Engine`.
      token_filter: as of `Engine`.
      stops: stop strings, which the server may end a response at; a response's watch decides.
    """

    def __init__(
        self,
        model: DecoderConfig,
        config: EngineConfig,
        client: Client,
        folders: Folders,
        *,
        seed: int,
        temperature: float,
        token_filter: TokenFilter = NO_FILTER,
        stops: tuple[str, ...] = (),
    ) -> None:
        self.model, self.config, self.stats = model, config, EngineStats()
        self.temperature, self.token_filter = temperature, token_filter
        self.base: Params = {}
        self.version = -1
        self._client, self._folders, self._seed, self._stops = client, folders, seed, stops
        self._conversations: dict[int, np.ndarray] = {}  # by slot, with a finished response
        self._asked: dict[int, tuple[int, Ask, Watch | None]] = {}  # slot, by the request's number
        self._ended: list[Response] = []
        self._wanted: Placed | None = None  # the weights of these conversations
        self._live: Placed | None = None  # the weights that the server has

    # ------------------------------------------------------------------------------ conversations

    @property
    def has_work(self) -> bool:
        """True while a submitted response is unfinished, or finished and not returned."""
        return bool(self._asked or self._ended)

    def room(self, slot: int, num_new: int, *, is_fresh: bool) -> int:
        """Return how many response tokens still fit after ``num_new`` more prompt tokens (may be <= 0)."""
        return self.config.room(0 if is_fresh else len(self._conversations.get(slot, ())), num_new)

    def submit(
        self,
        slot: int,
        tokens: Sequence[int] | np.ndarray,
        *,
        is_fresh: bool,
        ids: tuple[int, int, int, int],
        watch: Watch | None = None,
    ) -> None:
        """Send the slot's conversation with ``tokens`` at its end; as `Engine.submit`.

        Raises:
          RuntimeError: no weights are loaded, or the slot is still answering.
          ValueError: the prompt is empty, or not even one response token fits.
          SamplerError: the server does not take the weights.
        """
        if self._wanted is None:
            raise RuntimeError("ServerEngine.submit before swap: there are no weights to sample from")
        if any(other == slot for other, _, _ in self._asked.values()):
            raise RuntimeError(f"slot {slot} is still answering")
        allowed = self.room(slot, len(tokens), is_fresh=is_fresh)
        kept = np.zeros(0, np.int32) if is_fresh else self._conversations.get(slot, np.zeros(0, np.int32))
        prompt = np.concatenate([kept, np.asarray(tokens, np.int32)])
        if allowed < 1 or not len(prompt):
            raise ValueError(
                f"slot {slot}: a prompt of {len(prompt)} tokens leaves no room for a response, or is empty "
                f"(max_tokens={self.config.max_tokens})"
            )
        self._make_live(self._wanted, self.version)
        self._conversations[slot] = prompt
        ask = Ask(
            prompt,
            allowed,
            ids,
            make_seed(self._seed, ids),
            self.temperature,
            self.token_filter,
            self._stops,
            self.config.stop_ids,
        )
        self._asked[self._client.ask(ask)] = slot, ask, watch

    def release(self, slot: int) -> None:
        """Forget the slot's conversation; a response in progress is given up on the server, too."""
        for number in [number for number, (other, _, _) in self._asked.items() if other == slot]:
            self._client.cancel(number)
            del self._asked[number]
        self._ended = [response for response in self._ended if response.slot != slot]
        self._conversations.pop(slot, None)

    def step(self, *, is_eager: bool = True) -> list[Response]:
        """Wait a little for responses, and return those that ended, failed ones among them.

        Args:
          is_eager: wait shortly, because environments may answer meanwhile.

        Raises:
          SamplerError: the server refuses requests, or fails for too long.
        """
        if not is_eager:  # else whoever calls looks for a stop
            self._client.check()
        ended, self._ended = self._ended, []
        if not ended and self._asked:
            ended = self._take(EAGER_SECONDS if is_eager else PATIENT_SECONDS)
        return ended

    def _take(self, seconds: float) -> list[Response]:
        found = []
        for number, result in self._client.collect(seconds):
            if number in self._asked:  # else it was given up
                found.append(self._conclude(*self._asked.pop(number), result))
        return found

    def _conclude(self, slot: int, ask: Ask, watch: Watch | None, result: Sampled | Failure) -> Response:
        """Make the response, cut at its stop string."""
        if isinstance(result, Failure):
            return _failed(slot, ask, result.reason)
        found = None if watch is None else watch(result.tokens)
        is_stop = found is not None or int(result.tokens[-1]) in ask.stop_ids
        if result.finish_reason == "stop" and not is_stop:
            return _failed(slot, ask, "a response that stopped at no stop token and no stop string")
        keep = len(result.tokens) if found is None else found
        tokens, logprobs = result.tokens[:keep], result.logprobs[:keep]
        # The mean of the surprisals estimates the mean entropy; credit takes the learner's entropies.
        entropies = -logprobs if result.entropies is None else result.entropies[:keep]
        self._conversations[slot] = np.concatenate([ask.prompt, tokens])
        self._count(ask, result, keep)
        return Response(
            slot=slot,
            prompt_tokens=ask.prompt,
            tokens=tokens,
            logprobs=logprobs,
            entropies=entropies,
            versions=np.full(keep, self.version, np.int32),
            finish_reason="stop" if is_stop else "length",
        )

    def _count(self, ask: Ask, result: Sampled, kept: int) -> None:
        needed = len(ask.prompt) - 1
        self.stats.prompt_tokens += needed
        self.stats.prefilled_tokens += max(0, needed - result.cached)
        self.stats.sampled_tokens += kept
        self.stats.responses += 1

    # ------------------------------------------------------------------------------------ weights

    def place(self, params: Params) -> Placed:
        """Write parameters into a folder of their own."""
        return self._folders.write(params, self.base)

    def swap(self, placed: Placed, version: int, *, keep_cache: bool = False) -> None:
        """Let the server load weights that `place` has written; return when it has.

        Raises:
          RuntimeError: a response is in progress.
          SamplerError: the server refuses them, or fails for too long.
        """
        if self.has_work or keep_cache:
            raise RuntimeError("ServerEngine.swap in the middle of a turn: step it until has_work is False")
        self._wanted, self.version = placed, version
        self._make_live(placed, version)
        self._folders.remove_before(placed)

    def _make_live(self, placed: Placed, version: int) -> None:
        if placed is not self._live:
            self._client.publish(placed.path, version)
            self._live = placed

    @contextlib.contextmanager
    def lent(
        self,
        placed: Placed,
        version: int,
        *,
        temperature: float,
        token_filter: TokenFilter = NO_FILTER,
    ) -> Iterator[None]:
        """Give every slot to other conversations with these weights for a while; as `Engine.lent`.

        Responses in progress end first. The server gets its former weights back with the next request.
        """
        while self._asked:
            self._client.check()
            self._ended += self._take(PATIENT_SECONDS)
        own = {name: getattr(self, name) for name in _OWN}
        is_new = self._wanted is None or version != self.version
        self._conversations, self._asked, self._ended = {}, {}, []
        self.temperature, self.token_filter, self.stats = temperature, token_filter, EngineStats()
        try:
            if is_new:
                self._wanted, self.version = placed, version
                self._make_live(placed, version)
            yield
        finally:
            for number in self._asked:
                self._client.cancel(number)
            for name, value in own.items():
                setattr(self, name, value)
            self._folders.remove(placed)

    def measure_stale_gap(self) -> float | None:
        """Return None: no response is ever in progress when weights arrive."""
        return None

    def drop_cache(self) -> None:
        """Do nothing: the server drops its keys and values when it loads weights."""

    def free(self) -> None:
        """Do nothing: there is nothing on this machine."""

    def take_stats(self) -> EngineStats:
        """Return the counts since the last call, and reset them to zero."""
        stats, self.stats = self.stats, EngineStats()
        return stats

    def close(self) -> None:
        """End the connection, and delete the published weights."""
        self._client.close()
        self._folders.close()


def make_seed(seed: int, ids: tuple[int, int, int, int]) -> int:
    """Make a response's seed, in [0, 2**62): equal numbers give equal seeds, in every process."""
    text = ",".join(map(str, (seed, *ids)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2


def _failed(slot: int, ask: Ask, reason: str) -> Response:
    nothing = np.zeros(0, np.float32)
    none = np.zeros(0, np.int32)
    return Response(slot, ask.prompt, none, nothing, nothing, none, "failed", failure=reason)
