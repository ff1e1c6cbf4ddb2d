"""The rollout thread: it plays episodes while the learner, in the main thread, computes.

Two one-slot channels join the threads. The learner puts (weights, version) into the *mailbox*; the rollout
thread takes them at a turn boundary. The rollout thread puts the next update's groups into the *outbox*. The
rollout thread alone touches collector, engine, environment pool and ledger, until it has ended. Version ``u``
of the weights consumes the groups of the first ``u`` updates: one message says both.

With ``max_lag = 0`` the ledger admits nothing while the learner works, so both threads take turns: that is
synchronous training by the same code.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from empg_jax.engine.interface import SamplingEngine
from empg_jax.engine.stats import EngineStats, add_stats
from empg_jax.errors import Interrupted, RunError
from empg_jax.rollout.call import Call
from empg_jax.rollout.collector import Collector
from empg_jax.rollout.incidents import count_incidents
from empg_jax.rollout.ledger import Ledger, Reserved
from empg_jax.rollout.schedule import Recorder, Round, ScheduleError
from empg_jax.rollout.stored import StoredCollector
from empg_jax.types import Params, Trajectory

WAKE_SECONDS = 0.2  # between two looks of a waiting learner at requests to stop

Cut = tuple[dict[str, Any], list[Trajectory]]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Delivery:
    """The groups of one update, with what happened since the delivery before.

    Attributes:
      update: number of the update, from 0.
      trajectories: its episodes, sorted by (group, member).
      metrics: numbers of the time since the delivery before, by metric name.
      engine: the engine's counts since then.
      outcomes: episodes that ended since the start of the run, by ``status:reason``.
      incidents: faults since the start of the run, by metric name.
    """

    update: int
    trajectories: list[Trajectory]
    metrics: dict[str, float]
    engine: EngineStats
    outcomes: dict[str, int]
    incidents: dict[str, float]


class RolloutThread:
    """The thread that plays episodes, and what the learner's thread asks of it.

    Used as a context manager: the thread lives inside the block. An error in the thread is raised, with its
    own traceback, by the learner's next call.

    Args:
      collector: plays the attempts, on the engine and the environment pool.
      ledger: decides which groups are played and trained on.
      is_repeatable: `cut` answers with the ledger as it was when the newest weights were taken, so that what
        a stopped run repeats does not depend on the moment of the stop.
      max_stale_gap: new weights go live inside responses, which go on over the keys and values of older
        weights. Where the measured log-prob error is larger than this, in nats, all conversations are
        prefilled anew. None: new weights wait for the end of the responses in progress.

    Attributes:
      recorder: writes the schedule of the rounds; None writes none.
      schedule: rounds to repeat in place of free running; None runs freely.
    """

    def __init__(
        self,
        collector: Collector | StoredCollector,
        ledger: Ledger,
        *,
        is_repeatable: bool,
        max_stale_gap: float | None = None,
    ) -> None:
        self.collector, self.ledger, self._max_stale_gap = collector, ledger, max_stale_gap
        self.recorder: Recorder | None = None
        self.schedule: Iterator[Round] | None = None
        self._is_repeatable = is_repeatable
        self._version: int | None = None  # of the weights taken since the thread started
        self._at_commit: Cut | None = None  # the ledger at that moment
        self._changed = threading.Condition()  # guards what follows
        self._mailbox: collections.deque[tuple[Params, int]] = collections.deque()
        self._outbox: Delivery | None = None
        self._calls: collections.deque[Call[Any]] = collections.deque()
        self._error: BaseException | None = None
        self._is_stopping = False
        self._is_at_end = False  # the schedule has no further round
        self._thread: threading.Thread | None = None
        self._idle = self._paused = 0.0  # seconds since the last delivery
        self._openings = 0  # outages seen
        self._gaps: list[float] = []  # measured since the last delivery
        self._counts = EngineStats()  # before a resume, or a cut, and since the last delivery
        self._delivered: dict[int, EngineStats] = {}  # with the updates that are not consumed
        self._since = time.monotonic()

    @property
    def engine(self) -> SamplingEngine:
        """The sampler."""
        return self.collector.engine

    # --------------------------------------------------------------------- the learner's side

    def __enter__(self) -> RolloutThread:
        self._is_stopping, self._error = False, None
        self.collector.check = self._check
        self._version = self._outbox = None
        self._mailbox.clear()
        self._since = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="rollout", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._thread is not None
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._thread.join()
        self._thread = None
        # What is in flight is lost, and starts again where the run goes on.
        self.collector.cancel_all()
        if self.recorder is not None:
            with contextlib.suppress(*(() if kind is None else (RunError,))):  # the first error is told
                self.recorder.flush()

    def publish(self, params: Params, version: int) -> None:
        """Hand over the weights after ``version`` updates; return when the learner may change its own.

        Weights that the rollout thread has not taken yet are replaced.
        """
        placed = self.engine.place(params)
        with self._changed:
            if self.schedule is None:
                self._mailbox.clear()
            self._mailbox.append((placed, version))
            self._changed.notify_all()

    def next_batch(self, check: Callable[[], None] = lambda: None) -> Delivery:
        """Wait for the groups of the next update.

        Args:
          check: called while waiting; it may raise to end the wait.

        Raises:
          ScheduleError: the schedule to repeat has no further batch.
        """
        while True:
            check()
            with self._changed:
                if self._outbox is None and self._error is None:
                    self._changed.wait(WAKE_SECONDS)
                self._raise_error()
                if self._outbox is not None:
                    delivery, self._outbox = self._outbox, None
                    self._changed.notify_all()
                    return delivery
                if self._is_at_end:
                    raise ScheduleError("the schedule to repeat (rollout.schedule) ends before this update")

    def call(self, function: Callable[[], T]) -> T:
        """Run a function between two rounds of the rollout thread; return its result, or raise its error.

        Where the thread does not run, the function runs at once.
        """
        if self._thread is None:
            return function()
        call = Call(function)
        with self._changed:
            self._calls.append(call)
            self._changed.notify_all()
            while not call.is_done:
                self._raise_error()
                self._changed.wait(WAKE_SECONDS)
        return call.answer()

    def cut(self, updates: int) -> Cut:
        """Return the ledger as it belongs to the weights after ``updates`` updates; see `Ledger.cut`."""
        return self.call(lambda: self._cut(updates))

    def restore(self, values: dict[str, Any], trajectories: list[Trajectory]) -> None:
        """Go on from a `cut`, before the thread starts."""
        self.collector.pool.restore_faults(values["faults"])
        self.ledger.restore(values, trajectories)
        self._counts = EngineStats(**values.get("engine", {}))

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # --------------------------------------------------------------------- the rollout thread

    def _check(self) -> None:
        """End a round that waits for environments when the block is left: they may be away for long."""
        if self._is_stopping:
            raise Interrupted

    def _run(self) -> None:
        try:
            while self._round():
                pass
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _round(self) -> bool:
        """Take what the learner sent, offer what is ready, play one round; return False at the end."""
        wanted = self._next_wanted()
        done = Round()
        if not self._hear(wanted):
            return False
        if mail := self._take_mail(wanted):
            self._take_weights(*mail)
            done.weights = mail[1]
        if self._version is None:
            self._rest()
            return True
        if wanted is None or wanted.batch is not None:
            done.batch = self._offer()
        self.ledger.admit(self._version)
        self._pass_on()
        if self.collector.in_flight if wanted is None else wanted.answers is not None:
            ended, ages = self.collector.advance(wanted), self.collector.ages()
            for attempt, trajectory in ended:
                self.ledger.finish(attempt, trajectory, ages.pop(attempt, 0.0))
            if (openings := self.collector.pool.breaker.openings) != self._openings:
                # What failed before the pool knew of the outage says nothing of a task.
                self._openings = openings
                self.ledger.forgive()
            self.ledger.close_late(ages)
            self._pass_on()
            done.answers = self.collector.answered
        done.served, done.aged = self.collector.served, self.collector.aged
        if wanted not in (None, done, Round()):
            raise ScheduleError(f"the run differs from its schedule: {done} in place of {wanted}")
        if self.recorder is not None and not done.is_empty:
            self.recorder.add(done)
        if done.is_empty:
            self._rest()
        return True

    def _next_wanted(self) -> Round | None:
        """Return the next round of the schedule, and empty ones after its end; None without a schedule."""
        if self.schedule is None:
            return None
        wanted = next(self.schedule, None)
        if wanted is None:
            with self._changed:
                self._is_at_end = True
                self._changed.notify_all()
        return wanted or Round()

    def _hear(self, wanted: Round | None) -> bool:
        """Run the calls of the learner's thread; return False at the end.

        A round that is repeated waits here until the learner has done what the round needs.
        """
        while True:
            with self._changed:
                calls, self._calls = list(self._calls), collections.deque()
                is_stopping = self._is_stopping
            for call in calls:
                call.run()
            with self._changed:
                if calls:
                    self._changed.notify_all()
                if is_stopping:
                    return False
                if wanted is None or self._can_repeat(wanted):
                    return True
                if not self._calls:
                    self._changed.wait(WAKE_SECONDS)

    def _can_repeat(self, wanted: Round) -> bool:
        """Return whether the weights that a round takes are there, and the place for its batch."""
        has_weights = wanted.weights is None or any(version == wanted.weights for _, version in self._mailbox)
        return has_weights and (wanted.batch is None or self._outbox is None)

    def _take_mail(self, wanted: Round | None) -> tuple[Params, int] | None:
        """Take the newest weights, or those of the round to repeat."""
        with self._changed:
            if not self._mailbox or (wanted is not None and wanted.weights is None):
                return None
            mail = self._mailbox.popleft()
            while wanted is not None and mail[1] != wanted.weights:  # passed over, as they were before
                mail = self._mailbox.popleft()
            return mail

    def _take_weights(self, placed: Params, version: int) -> None:
        """Make weights live; the groups of the updates that made them are consumed."""
        began = time.monotonic()
        if self._max_stale_gap is None:
            self.collector.settle()
            self.engine.swap(placed, version)
        else:
            self.engine.swap(placed, version, keep_cache=True)
            self._bound_gap(self._max_stale_gap)
        self.ledger.commit(version)
        self._delivered = {update: each for update, each in self._delivered.items() if update >= version}
        self._version = version
        self._at_commit = self._cut_now(version) if self._is_repeatable else None
        self._paused += time.monotonic() - began

    def _bound_gap(self, limit: float) -> None:
        """Measure the error of the kept keys and values, and drop them where it is too large."""
        gap = self.engine.measure_stale_gap()
        if gap is None:
            return
        self._gaps.append(gap)
        if not gap <= limit:  # NaN is too large, too
            self.engine.drop_cache()

    def _offer(self) -> int | None:
        """Put the next update's groups into the outbox, if it is empty and they are complete.

        Returns:
          The number of the update; None when nothing was offered.
        """
        if self._outbox is not None:  # only this thread fills it
            return None
        reserved = self.ledger.reserve()
        if reserved is None:
            return None
        delivery = self._describe(reserved)
        with self._changed:
            self._outbox = delivery
            self._changed.notify_all()
        return reserved.update

    def _describe(self, reserved: Reserved) -> Delivery:
        now = time.monotonic()
        spent, self._since = max(now - self._since, 1e-9), now
        times = {"rollout_idle": self._idle / spent, "publish_pause": self._paused}
        self._idle = self._paused = 0.0
        if self._gaps:
            times["stale_gap"] = float(np.max(self._gaps))  # NaN where one is
            times["stale_refills"] = float(sum(not gap <= (self._max_stale_gap or 0.0) for gap in self._gaps))
            self._gaps.clear()
        counts = self._delivered[reserved.update] = add_stats([self._counts, self.engine.take_stats()])
        self._counts = EngineStats()
        return Delivery(
            reserved.update,
            reserved.trajectories,
            reserved.metrics | times,
            counts,
            dict(self.ledger.outcomes),
            count_incidents(self.ledger, self.collector.pool),
        )

    def _pass_on(self) -> None:
        """Give the ledger's wishes to the collector."""
        for group_id in self.ledger.cancels:
            self.ledger.waste(self.collector.cancel(group_id))
        self.collector.admit(self.ledger.starts)
        self.ledger.cancels, self.ledger.starts = [], []

    def _rest(self) -> None:
        """Wait for the learner: there is nothing to play."""
        began = time.monotonic()
        with self._changed:
            was_full = self._outbox is not None
            # After the end of a schedule no weights are taken.
            while not ((self._mailbox and not self._is_at_end) or self._calls or self._is_stopping):
                if was_full and self._outbox is None:  # it may be filled again
                    break
                self._changed.wait(WAKE_SECONDS)
        self._idle += time.monotonic() - began

    def _cut(self, updates: int) -> Cut:
        if self._at_commit is not None and self._version == updates:
            return self._at_commit
        return self._cut_now(updates)

    def _cut_now(self, updates: int) -> Cut:
        values, trajectories = self.ledger.cut(updates)
        self._counts = add_stats([self._counts, self.engine.take_stats()])
        # The groups of later updates are delivered again, and so are their counts.
        again = [each for update, each in self._delivered.items() if update >= updates]
        values["engine"] = dataclasses.asdict(add_stats([self._counts, *again]))
        return values | {"faults": self.collector.pool.fault_snapshot()}, trajectories
