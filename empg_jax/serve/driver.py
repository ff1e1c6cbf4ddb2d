"""The engine's thread: requests come in by a queue, their tokens go out by callbacks.

One thread owns the engine. Handlers of HTTP requests only hand over a `Job` and wait for its updates, so that
all requests share one batch, and a response does not depend on which others are in it.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import weakref
from collections.abc import Callable

import jax
import numpy as np

from empg_jax.engine.engine import Engine, Response, Watch
from empg_jax.models.filtering import NO_FILTER, TokenFilter
from empg_jax.serve.slots import Place, SlotTable
from empg_jax.types import Params

STREAM = 2  # first number of the sampling ids; 0 and 1 are training and evaluation
CLOSE_SECONDS = 1.0  # granted to a burst in progress at the end
STOPPING = "the server is stopping"
SEED_BITS = 31  # of a seed in one of the engine's four ids

MEMORY_ERRORS = (MemoryError, jax.errors.JaxRuntimeError)  # the second is also raised for other reasons

logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """More requests wait than the server accepts."""


class EngineFailed(Exception):
    """The engine raised; the server cannot go on."""


@dataclasses.dataclass(eq=False, frozen=True, slots=True, weakref_slot=True)
class Weights:
    """Weights that responses can be sampled from.

    Attributes:
      version: their policy version.
      read: called on the engine's thread; returns the trained parameters, on any devices.
    """

    version: int
    read: Callable[[], Params]


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    """News of a job.

    Attributes:
      response: all of the response so far; None after an error.
      cached: prompt tokens that were in the slot already, or copied from another.
      is_final: whether the job is over.
      error: why there is no response.
    """

    response: Response | None
    cached: int = 0
    is_final: bool = False
    error: str | None = None


@dataclasses.dataclass(eq=False, slots=True)
class Job:
    """One response to sample. The same prompt, seed and choice give the same response, in any company.

    Attributes:
      prompt: token ids.
      max_tokens: longest response; None takes all the room.
      temperature: 0 is greedy.
      seed: any integer.
      choice: number of the response among those of one request.
      notify: called on the engine's thread, with every update if ``is_streamed``, else with the final one.
      watch: asked on the engine's thread whether the response ends, as in `Engine.submit`.
      is_streamed: whether updates come before the end, too.
      token_filter: restricts sampling to likely tokens.
      weights: what to sample from; None takes the newest that were published.
      key: numbers in place of seed and choice.
    """

    prompt: np.ndarray
    max_tokens: int | None
    temperature: float
    seed: int
    choice: int
    notify: Callable[[Update], None]
    watch: Watch | None = None
    is_streamed: bool = False
    token_filter: TokenFilter = NO_FILTER
    weights: Weights | None = None
    key: tuple[int, int, int, int] | None = None

    @property
    def ids(self) -> tuple[int, int, int, int]:
        """The numbers that the engine's keys are folded from."""
        if self.key is not None:
            return self.key
        mask = (1 << SEED_BITS) - 1
        return STREAM, (self.seed >> SEED_BITS) & mask, self.seed & mask, self.choice


def lacks_memory(error: BaseException) -> bool:
    """Tell whether one of `MEMORY_ERRORS` means that an allocation failed."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


class Driver:
    """The owner of an engine and its thread. Use it as a context manager.

    Args:
      engine: with weights.
      max_waiting: jobs that may wait for a slot.
      on_failure: called once, on the engine's thread, when the engine raises.

    Attributes:
      failure: what the engine raised; None while it runs.
    """

    def __init__(
        self, engine: Engine, *, max_waiting: int, on_failure: Callable[[], None] = lambda: None
    ) -> None:
        self.engine = engine
        self.failure: str | None = None
        self._max_waiting, self._on_failure = max_waiting, on_failure
        self._table = SlotTable(engine.config.slots)
        self._lock = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._canceled: set[Job] = set()
        self._live: dict[int, tuple[Job, Place]] = {}
        # None stands for the weights that the engine came with.
        self._newest: Weights | None = None
        self._loaded: Weights | None = None
        # Why these have no room: requests for them are refused, and others are answered.
        self._too_large: weakref.WeakKeyDictionary[Weights, str] = weakref.WeakKeyDictionary()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> Driver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_busy(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    @property
    def most_at_once(self) -> int:
        """Largest number of jobs that a request may have."""
        return self._max_waiting + self.engine.config.slots

    def close(self) -> None:
        """Stop the thread after its burst; one that takes longer than `CLOSE_SECONDS` is left alone."""
        with self._lock:
            self._is_closed = True
            self._lock.notify()
        # A burst is short, but its first compilation may take longer than anyone waits.
        self._thread.join(timeout=CLOSE_SECONDS)

    def submit(self, jobs: list[Job], *, wakes: bool = True) -> None:
        """Hand over the jobs of one request; unless it ``wakes``, an idle engine waits for `wake`.

        Raises:
          QueueFull: they would exceed the number of jobs that may wait.
          EngineFailed: the engine has raised.
        """
        with self._lock:
            if self._is_closed:
                raise EngineFailed(self.failure or STOPPING)
            free = self.engine.config.slots - len(self._live)
            if len(self._waiting) + len(jobs) > self._max_waiting + free:
                raise QueueFull
            self._waiting.extend(jobs)
            if wakes:
                self._lock.notify()

    def wake(self) -> None:
        """Let an idle engine look for jobs."""
        with self._lock:
            self._lock.notify()

    @property
    def version(self) -> int:
        """Version of the weights that jobs from now on sample from, if they name none."""
        newest = self._newest
        return self.engine.version if newest is None else newest.version

    def publish(self, weights: Weights) -> None:
        """Let later jobs that name no weights sample from these."""
        with self._lock:
            self._newest = weights

    def cancel(self, jobs: list[Job]) -> None:
        """Give up jobs: those that wait at once, others before the next burst. What is over is ignored."""
        with self._lock:
            gone = set(jobs)
            self._waiting = collections.deque(job for job in self._waiting if job not in gone)
            self._canceled |= gone
            self._lock.notify()

    def describe(self) -> dict[str, int]:
        """Count slots, requests and tokens, for ``GET /health``."""
        with self._lock:
            stats = self.engine.stats
            return {
                "slots": self.engine.config.slots,
                "busy": len(self._live),
                "kept": self._table.kept,
                "waiting": len(self._waiting),
                "responses": stats.responses,
                "bursts": stats.bursts,
                "prefilled_tokens": stats.prefilled_tokens,
                "sampled_tokens": stats.sampled_tokens,
            }

    # ------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            while self._prepare():
                responses = self.engine.step()
                self._deliver(responses)
        except Exception as error:
            logger.exception("the engine failed")
            self.failure = f"{type(error).__name__}: {error}"
            self._give_up(self.failure)
            self._on_failure()
            return
        self._give_up(STOPPING)

    def _prepare(self) -> bool:
        """Wait for work and place it in slots; return False at the end."""
        while True:
            with self._lock:
                if self._is_closed:
                    return False
                self._drop_canceled()
                refused = self._take_refused()
                self._place_waiting()
                has_work, weights = self.engine.has_work, self._missing_weights()
                if not has_work and weights is None and not refused:
                    self._lock.wait()
            # The lock is not held: handlers must not wait for callbacks, nor for a copy of the weights.
            for job, reason in refused:
                job.notify(Update(None, is_final=True, error=reason))
            if has_work:
                return True
            # The engine is idle: those who sample from other weights wait for its last response.
            if weights is not None:
                self._load(weights)

    def _drop_canceled(self) -> None:
        if not self._canceled:
            return
        for slot, (job, _) in list(self._live.items()):
            if job in self._canceled:
                self._end(slot, self.engine.progress(slot))
        self._canceled.clear()

    def _place_waiting(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            if self._missing_weights() is not None:
                return
            place = self._table.take(job.prompt)
            if place is None:
                return
            self._waiting.popleft()
            self.engine.cut(place.slot, place.kept)
            self.engine.submit(
                place.slot,
                job.prompt[place.kept :],
                is_fresh=place.kept == 0,
                ids=job.ids,
                max_response=job.max_tokens,
                temperature=job.temperature,
                token_filter=job.token_filter,
                watch=job.watch,
            )
            self._live[place.slot] = job, place

    def _missing_weights(self) -> Weights | None:
        """Return the weights that the next job needs, if the engine has others."""
        wanted = (self._waiting[0].weights or self._newest) if self._waiting else None
        return None if wanted is self._loaded else wanted

    def _take_refused(self) -> list[tuple[Job, str]]:
        """Remove the waiting jobs whose weights have no room; return them with the reason."""
        if not self._too_large:
            return []
        waiting, refused = list(self._waiting), []
        self._waiting.clear()
        for job in waiting:
            weights = job.weights or self._newest
            if weights is not None and weights in self._too_large:
                refused.append((job, self._too_large[weights]))
            else:
                self._waiting.append(job)
        return refused

    def _load(self, weights: Weights) -> None:
        try:
            placed = self.engine.place(weights.read())
        except MEMORY_ERRORS as error:
            if not lacks_memory(error):
                raise
            logger.exception("weights of version %d have no room", weights.version)
            self._too_large[weights] = f"no memory for the weights of version {weights.version}: {error}"
            return
        self.engine.swap(placed, weights.version)
        with self._lock:
            self._table.clear()  # the conversations that other weights computed
        self._loaded = weights

    def _deliver(self, ended: list[Response]) -> None:
        finals = {response.slot: response for response in ended}
        # The lock is not held here: a callback may take long, and handlers must not wait for it.
        for slot, (job, place) in list(self._live.items()):
            final = finals.get(slot)
            if final is None and not job.is_streamed:
                continue
            response = final or self.engine.progress(slot)
            if final is not None:
                with self._lock:
                    self._end(slot, response)
            if final is not None or job.is_streamed:
                job.notify(Update(response, max(place.kept, response.copied), is_final=final is not None))

    def _end(self, slot: int, response: Response) -> None:
        """Free a slot, which keeps what the response holds."""
        tokens = np.concatenate([response.prompt_tokens, response.tokens])
        self.engine.cut(slot, len(tokens))
        self._table.keep(slot, tokens, len(response.prompt_tokens))
        del self._live[slot]

    def _give_up(self, reason: str) -> None:
        with self._lock:
            self._is_closed = True
            jobs = [*self._waiting, *(job for job, _ in self._live.values())]
            self._waiting.clear()
        for job in jobs:
            job.notify(Update(None, is_final=True, error=f"the engine has stopped: {reason}"))
