"""Sampling sessions: which weights each of them samples from, and what a sample request may ask for."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import secrets
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from empg_jax.serve.asked import Asked
from empg_jax.serve.driver import Driver, Weights
from empg_jax.serve.service import Service
from empg_jax.serve.tinker.codec import read_chunks
from empg_jax.serve.tinker.futures import Futures, Pending
from empg_jax.serve.tinker.sampling import Sampling
from empg_jax.serve.tinker.store import Stamp, Store
from empg_jax.serve.tinker.trainer import Trainer
from empg_jax.serve.tinker.worker import Worker
from empg_jax.serve.wire import ApiError, refuse

# Fields of a sample request that ask for what there is not.
_ABSENT = ("topk_prompt_logprobs", "topk_sample_logprobs", "target_prompt_logprobs", "prompt_alt_tokens_k")
_PARAMS = ("max_tokens", "seed", "temperature", "top_k", "top_p")


@dataclasses.dataclass
class Sampler:
    """A sampling session.

    Attributes:
      session_id: the session that it belongs to.
      weights: what it samples from; None samples from the newest weights.
      path: the saved weights that it came from.
      stamp: of these weights, when they were read.
      is_dropped: whether its weights are no longer kept.
    """

    session_id: str
    weights: Weights | None
    path: str | None = None
    stamp: Stamp | None = None
    is_dropped: bool = False


class Samplers:
    """The sampling side of the API.

    Args:
      service: reads sampling options.
      driver: the engine's thread.
      trainer: the model in training, used on the worker's thread only.
      worker: the thread, which scores prompts, too.
      futures: where results are left.
      store: saved weights.
      keep: number of different weights that are kept in memory: those that were used last.

    Attributes:
      newest: the weights that were saved last.
    """

    newest: Weights

    def __init__(
        self,
        service: Service,
        driver: Driver,
        *,
        trainer: Trainer,
        worker: Worker,
        futures: Futures,
        store: Store,
        keep: int,
    ) -> None:
        self.driver, self.trainer, self.worker, self.futures = driver, trainer, worker, futures
        self._service, self._store, self._keep = service, store, keep
        first = trainer.start.params
        self._first = Weights(0, lambda: first)
        # Published at once: else the other routes would go on with whatever a session has loaded.
        self.publish(self._first)
        self._samplers: dict[str, Sampler] = {}
        self._kept: collections.OrderedDict[Weights, None] = collections.OrderedDict()
        # On the worker's thread: one object for all who sample from the same saved weights.
        self._saved: weakref.WeakValueDictionary[tuple[str, Stamp], Weights] = weakref.WeakValueDictionary()

    # ------------------------------------------------------------------------------------- weights

    def snapshot(self) -> Weights:
        """Copy the weights in training, unless they are those of the last time; on the worker's thread."""
        newest, version = self.newest, self.trainer.version
        if newest.version == version:
            return newest
        params = self.trainer.read()
        return Weights(version, lambda: params)

    def publish(self, weights: Weights) -> None:
        """Make weights the newest: the other routes sample from them, and sessions that follow."""
        self.newest = weights
        self.driver.publish(weights)

    def open(
        self,
        session_id: str,
        weights: Weights | None,
        path: str | None = None,
        stamp: Stamp | None = None,
    ) -> str:
        """Begin a sampling session; return its id."""
        sampler_id = f"{session_id}:sample:{secrets.token_hex(6)}"
        self._samplers[sampler_id] = Sampler(session_id, weights, path, stamp)
        self._use(weights)
        return sampler_id

    def _use(self, weights: Weights | None) -> None:
        """Keep weights, and drop those whose last use is longest ago."""
        if weights is None or weights is self._first:
            return
        self._kept[weights] = None
        self._kept.move_to_end(weights)
        while len(self._kept) > self._keep:
            old, _ = self._kept.popitem(last=False)
            for sampler in self._samplers.values():
                if sampler.weights is old:
                    sampler.weights, sampler.is_dropped = None, True

    def _read_saved(self, path: Any, stamp: Stamp) -> Weights:
        """Return saved weights, from the disk unless somebody has them; on the worker's thread."""
        weights = self._saved.get((path, stamp))
        if weights is None:
            params = self._store.load(path)
            weights = Weights(self._store.version(path), lambda: params)
            self._saved[path, stamp] = weights
        return weights

    def _read_again(self, sampler: Sampler) -> Weights:
        """Return the saved weights of a sampling session that were dropped; on the worker's thread."""
        path, stamp = sampler.path, sampler.stamp
        assert stamp is not None
        if self._store.stamp(path) != stamp:
            raise refuse(
                f"the weights of {path} were overwritten since this sampling session began: begin another"
            )
        return self._read_saved(path, stamp)

    async def open_for(self, session_id: str, base_model: Any, path: Any) -> str:
        """Begin a sampling session of the base model or of saved weights; return its id.

        Raises:
          ApiError: there is no such model, or there are no such weights.
        """
        if path is None:
            self.check_base(base_model)
            return self.open(session_id, self._first)

        def read() -> tuple[Weights, Stamp]:
            stamp = self._store.stamp(path)
            return self._read_saved(path, stamp), stamp

        weights, stamp = await self.worker.run(read)
        return self.open(session_id, weights, str(path), stamp)

    def check_base(self, base_model: Any) -> None:
        """Check the name of the base model.

        Raises:
          ApiError: it is another.
        """
        if base_model != self._service.name:
            message = f"base model {base_model!r} does not exist; this server has {self._service.name!r}"
            raise ApiError(404, message, param="base_model")

    def find(self, sampler_id: Any) -> Sampler:
        """Look a sampling session up.

        Raises:
          ApiError: there is none, or its weights are no longer kept and were not saved.
        """
        sampler = self._samplers.get(sampler_id)
        if sampler is None:
            raise ApiError(
                404, f"sampling session {sampler_id!r} does not exist", param="sampling_session_id"
            )
        if sampler.is_dropped and sampler.path is None:
            raise refuse(
                f"the weights of sampling session {sampler_id} are no longer kept: the server keeps the "
                f"{self._keep} used last (serve.snapshots); save them under a name to sample from them later"
            )
        return sampler

    def forget(self, session_id: str) -> None:
        """Drop the sampling sessions of a session."""
        gone = [key for key, sampler in self._samplers.items() if sampler.session_id == session_id]
        for key in gone:
            del self._samplers[key]
        used = {sampler.weights for sampler in self._samplers.values()}
        for weights in list(self._kept):
            if weights not in used:
                del self._kept[weights]

    # ------------------------------------------------------------------------------------- samples

    def sample(self, body: Mapping[str, Any]) -> tuple[Pending, int]:
        """Sample responses to a prompt.

        Returns:
          The request, and its number of responses.

        Raises:
          ApiError: the request is malformed, or the queue is full.
        """
        sampler_id, number = body.get("sampling_session_id"), body.get("seq_id")
        sampler = self.find(sampler_id)
        if type(number) is not int or number < 0:
            raise refuse(f"seq_id={number!r} must be an integer from 0", "seq_id")
        asked = self._read(body)
        pending, is_new = self.futures.begin(f"{sampler_id}:{number}", "asample")
        if is_new:
            wants_prompt = body.get("prompt_logprobs") is True
            last = body.get("prompt_logprobs_last_n") if wants_prompt else 0

            def begin(weights: Weights | None) -> None:
                self._use(weights)
                Sampling(self, weights or self.newest, pending, asked, last).begin(weights)

            if sampler.is_dropped:
                self._restore(sampler, pending, begin)
            else:
                begin(sampler.weights)
        return pending, asked.num_choices

    def _restore(self, sampler: Sampler, pending: Pending, begin: Callable[[Weights], None]) -> None:
        """Read the saved weights of a sampling session again, and begin with its request."""

        def done(weights: Any, error: ApiError | None) -> None:
            if error is not None:
                self.futures.fail(pending, error)
                return
            sampler.weights, sampler.is_dropped = weights, False
            with contextlib.suppress(ApiError):  # it was dropped, and the client sends it again
                begin(weights)

        self.worker.submit(lambda: self._read_again(sampler), done)

    def _read(self, body: Mapping[str, Any]) -> Asked:
        for name in _ABSENT:
            if body.get(name):
                raise refuse(f"{name}={body[name]!r} is not supported", name)
        given = body.get("sampling_params")
        if not isinstance(given, dict):
            raise refuse("sampling_params is missing", "sampling_params")
        options = {name: given.get(name) for name in _PARAMS} | {"n": body.get("num_samples", 1)}
        last = body.get("prompt_logprobs_last_n")
        if last is not None and (type(last) is not int or last < 1):
            raise refuse(
                f"prompt_logprobs_last_n={last!r} must be an integer from 1", "prompt_logprobs_last_n"
            )
        stop = given.get("stop")
        if stop == []:
            raise refuse(
                "stop=[] is not supported: the model's own stop tokens always end a response", "stop"
            )
        is_ids = isinstance(stop, list) and type(stop[0]) is int
        options["stop_token_ids" if is_ids else "stop"] = stop
        tokens = read_chunks(body.get("prompt"), "prompt").tolist()
        return self._service.read_generate({"token_ids": tokens, "sampling_params": options})
