"""What waits during an outage, and the probes that end it."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

from empg_jax.workers.breaker import Breaker
from empg_jax.workers.record import EpisodeRecord
from empg_jax.workers.supervisor import Supervisor


class Outages:
    """The held resets of a pool, and its probes.

    A probe repeats an episode that failed, up to the command that failed, in a slot of its own. So it finds
    out whether exactly that works again, even where resets always work and only steps need the backend. Each
    probe takes another one of the failures since the last success, because one of them may have a broken
    task. Where it is resets that fail, every second probe is one of those that wait.
    """

    def __init__(
        self,
        breaker: Breaker,
        workers: Sequence[Supervisor],
        worker_of: Callable[[int], Supervisor],
        size: int,
    ):
        """Start without any outage; ``size`` failures are remembered."""
        self._breaker, self._workers, self._worker_of = breaker, workers, worker_of
        self._held: list[EpisodeRecord] = []
        self._failed: collections.deque[EpisodeRecord] = collections.deque(maxlen=size)
        self._probe: EpisodeRecord | None = None
        self._probes = 0

    @property
    def due(self) -> float:
        """Time of the next probe; infinite where none is due before something else happens."""
        return self._breaker.probe_at if self._may_probe() else float("inf")

    def hold(self, episode: EpisodeRecord) -> None:
        """Keep a reset back until the outage is over."""
        self._held.append(episode)

    def remember(self, episode: EpisodeRecord) -> None:
        """Keep a failed episode, for a probe."""
        self._failed.append(episode)

    def forget(self) -> None:
        """Forget the failures before an episode that succeeded."""
        if not self._breaker.is_open:
            self._failed.clear()

    def tend(self) -> None:
        """Send a probe when it is due.

        Raises:
          PoolError: the outage lasts too long.
        """
        if not self._breaker.is_open:
            return
        self._breaker.check()
        if self._breaker.is_disproved:
            self._end()
            return
        if not self._may_probe() or not self._breaker.take_probe():
            return
        if not self._failed:  # only workers failed, and they have started again
            self._end()
            return
        self._probe = probe = self._choose()
        assert probe.request is not None
        self._worker_of(probe.handle).ask(probe, *probe.request)

    def _choose(self) -> EpisodeRecord:
        """Make the next probe."""
        self._probes += 1
        self._failed.rotate()
        model = self._failed[0]
        waiting = next((episode for episode in self._held if episode.is_live), None)
        if self._probes % 2 == 0 and not model.has_begun and waiting is not None:
            model = waiting
        handle = -1 - model.handle
        return model.make_probe(handle, is_replayable=self._worker_of(handle).is_replayable)

    def pass_probe(self, probe: EpisodeRecord, op: str) -> None:
        """Take the answer of a probe; its environment is closed before the probe is forgotten."""
        worker = self._worker_of(probe.handle)
        if op != "close":
            self._end()
            worker.ask(probe, "close", {})
        elif worker.episodes.get(probe.handle) is probe:
            worker.forget(probe.handle)

    def fail_probe(self, probe: EpisodeRecord) -> None:
        """Take the failure of a probe."""
        if self._probe is probe:
            self._probe = None

    def _may_probe(self) -> bool:
        """Return whether no probe is on its way and every worker starts."""
        return self._probe is None and not any(worker.is_failing for worker in self._workers)

    def _end(self) -> None:
        """Close the breaker and send what was held."""
        self._breaker.close()
        self._failed.clear()
        self._probe = None
        held, self._held = self._held, []
        for episode in held:
            if episode.is_live:
                self._worker_of(episode.handle).resume(episode)
