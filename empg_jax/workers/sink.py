"""What a supervisor reports to its pool."""

from __future__ import annotations

from typing import Any, Protocol

from empg_jax.workers.faults import Reason
from empg_jax.workers.record import EpisodeRecord


class Sink(Protocol):
    """The receiver of a supervisor's results; each request ends in one call of `answered` or `failed`."""

    def answered(self, episode: EpisodeRecord, message: dict[str, Any]) -> None:
        """Take the answer to the episode's request."""

    def failed(
        self, episode: EpisodeRecord, reason: Reason, detail: str, *, is_incident: bool = True
    ) -> None:
        """Take the report that the episode is lost; by its own fault, or with its worker (no incident)."""

    def lost_worker(self, reason: Reason, detail: str) -> None:
        """Take the report that a worker died by nobody's fault and took episodes with it."""

    def start_failed(self, detail: str) -> None:
        """Take the report that a worker that was ready before does not start any more."""
