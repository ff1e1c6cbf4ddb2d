"""One sample request on its way: its responses from the engine, and the scores of its prompt."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from empg_jax.serve.asked import Asked
from empg_jax.serve.driver import Driver, EngineFailed, Job, QueueFull, Update, Weights
from empg_jax.serve.tinker.codec import SampleResult
from empg_jax.serve.tinker.futures import Futures, Pending
from empg_jax.serve.tinker.trainer import Trainer
from empg_jax.serve.tinker.worker import Worker
from empg_jax.serve.wire import ApiError


class Desk(Protocol):
    """Where a request finds what it needs."""

    driver: Driver
    trainer: Trainer
    worker: Worker
    futures: Futures


@dataclasses.dataclass
class Sampling:
    """A sample request.

    Attributes:
      desk: engine, trainer and futures.
      weights: the weights that prompts are scored with.
      pending: where the result goes.
      asked: prompt and sampling options.
      last: number of prompt tokens whose scores are wanted, from the end; None wants all, 0 none.
    """

    desk: Desk
    weights: Weights
    pending: Pending
    asked: Asked
    last: int | None
    updates: dict[int, Update] = dataclasses.field(default_factory=dict)

    def begin(self, weights: Weights | None) -> None:
        """Hand the jobs to the engine.

        Args:
          weights: what to sample from; None samples from the newest when a slot is free.

        Raises:
          ApiError: the queue is full, or the engine has stopped.
        """
        loop = asyncio.get_running_loop()
        jobs: list[Job] = [
            dataclasses.replace(self.asked.make_job(index, self._receiver(loop, index)), weights=weights)
            for index in range(self.asked.num_choices)
        ]
        try:
            self.desk.driver.submit(jobs)
        except QueueFull:
            self.desk.futures.drop(self.pending)
            raise ApiError(429, "the server is busy (serve.max_waiting): try again later") from None
        except EngineFailed as error:
            self.desk.futures.drop(self.pending)
            raise ApiError(503, f"the engine has stopped: {error}") from None
        self.pending.give_up = lambda: self.desk.driver.cancel(jobs)

    def _receiver(self, loop: asyncio.AbstractEventLoop, index: int) -> Callable[[Update], None]:
        def receive(update: Update) -> None:
            # The loop is closed when the server stops before the engine does.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._take, index, update)

        return receive

    def _take(self, index: int, update: Update) -> None:
        if update.error is not None:
            self._finish(None, ApiError(503, update.error))
            return
        self.updates[index] = update
        if len(self.updates) < self.asked.num_choices:
            return
        if self.last == 0:
            self._finish(None, None)
        else:
            self.desk.worker.submit(self._score, self._finish)

    def _score(self) -> np.ndarray:
        """Score the prompt under the weights of the samples; on the worker's thread."""
        prompt = self.asked.prompts[0]
        scores = np.full(len(prompt), np.nan, np.float32)
        if len(prompt) > 1:
            scores[1:] = self.desk.trainer.score(self.weights.read(), prompt)
        if self.last is not None:
            scores[: max(1, len(prompt) - self.last)] = np.nan
        return scores

    def _finish(self, scores: Any, error: ApiError | None) -> None:
        if error is not None:
            self.desk.futures.fail(self.pending, error)
            return
        updates = [self.updates[index] for index in sorted(self.updates)]
        responses = [update.response for update in updates if update.response is not None]
        self.desk.futures.finish(self.pending, SampleResult(responses, updates[0].cached, scores))
