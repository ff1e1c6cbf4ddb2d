"""Counts of faults since the last line of metrics, as numbers for the next line."""

from __future__ import annotations

import collections

from empg_jax.rollout.source import GroupSource


class IncidentMeter:
    """A meter that turns counts since the start of a run into counts since the last call.

    Args:
      source: the source of training episodes; the meter also reads its pool and its buffer.
    """

    def __init__(self, source: GroupSource) -> None:
        self._source = source
        self._outcomes, self._counts = self._read()

    def take(self) -> dict[str, float]:
        """Return the counts since the last call, by metric name; the first call counts from construction."""
        outcomes, counts = self._read()
        ended: collections.Counter[str] = collections.Counter()
        for key, count in (outcomes - self._outcomes).items():
            status, _, reason = key.partition(":")
            ended[f"outcome_{reason}"] += count
            ended["episodes_discarded"] += count if status == "discarded" else 0
        values = {name: float(count - self._counts[name]) for name, count in counts.items()}
        # Zero by default: a metric that appears only after a fault would be missing from the plots.
        values |= {"episodes_discarded": 0.0} | {name: float(count) for name, count in ended.items()}
        values["tasks_quarantined"] = float(len(self._source.collector.pool.quarantined()))
        self._outcomes, self._counts = outcomes, counts
        return values

    def _read(self) -> tuple[collections.Counter[str], dict[str, float]]:
        """Read the outcomes of episodes, and all other counts, since the start."""
        stats = self._source.collector.pool.stats
        counts = {
            "worker_restarts": stats.restarts + stats.recycled,
            "episodes_recovered": stats.recovered,
            "breaker_seconds": self._source.collector.pool.breaker.seconds,
            "groups_stale": self._source.buffer.stats.stale_groups,
            "groups_failed": self._source.failed_groups,
        }
        return collections.Counter(self._source.outcomes), counts
