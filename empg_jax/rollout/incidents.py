"""What went wrong since the last line of metrics, as numbers for the next one."""

from __future__ import annotations

import collections

from empg_jax.rollout.source import GroupSource


class IncidentMeter:
    """Turns counts since the start of a run into counts since the last look.

    Args:
      source: the source of training episodes; its pool and its buffer are watched too.
    """

    def __init__(self, source: GroupSource) -> None:
        self._source = source
        self._outcomes, self._counts = self._read()

    def take(self) -> dict[str, float]:
        """Counts since the last call (since the meter was made, the first time), by name in the glossary."""
        outcomes, counts = self._read()
        ended: collections.Counter[str] = collections.Counter()
        for key, count in (outcomes - self._outcomes).items():
            status, _, reason = key.partition(":")
            ended[f"outcome_{reason}"] += count
            ended["episodes_discarded"] += count if status == "discarded" else 0
        values = {name: float(count - self._counts[name]) for name, count in counts.items()}
        values |= {"episodes_discarded": 0.0} | {name: float(count) for name, count in ended.items()}
        values["tasks_quarantined"] = float(len(self._source.collector.pool.quarantined()))
        self._outcomes, self._counts = outcomes, counts
        return values

    def _read(self) -> tuple[collections.Counter[str], dict[str, int]]:
        """Outcomes of episodes, and all other counts, since the start."""
        stats = self._source.collector.pool.stats
        counts = {
            "worker_restarts": stats.restarts + stats.recycled,
            "episodes_recovered": stats.recovered,
            "groups_stale": self._source.buffer.stats.stale_groups,
            "groups_failed": self._source.failed_groups,
        }
        return collections.Counter(self._source.outcomes), counts
