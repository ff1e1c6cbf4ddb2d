"""Counts of faults and waste: since the start of a run, and since the last line of metrics."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

from empg_jax.rollout.ledger import Ledger
from empg_jax.workers.pool import EnvPool


def count_incidents(ledger: Ledger, pool: EnvPool) -> dict[str, float]:
    """Count what was spent and went wrong since the start, by metric name.

    `tasks_quarantined` is the present number.
    """
    return {
        "worker_restarts": pool.stats.restarts + pool.stats.recycled,
        "episodes_recovered": pool.stats.recovered,
        "breaker_seconds": pool.breaker.seconds,
        "groups_failed": ledger.counts["groups_failed"],
        "tokens_wasted": ledger.counts["tokens_wasted"],
        "environment_steps": ledger.counts["environment_steps"],
        "tasks_quarantined": len(pool.quarantined()),
    }


class IncidentMeter:
    """A meter that turns counts since the start of a run into counts since the last call.

    Args:
      outcomes: episodes that had ended before, by ``status:reason``.
      incidents: as `count_incidents` returns them.

    Attributes:
      before: both at the last call, by the names of the arguments.
    """

    def __init__(self, outcomes: Mapping[str, int], incidents: Mapping[str, float]) -> None:
        self.before: dict[str, dict[str, Any]] = {"outcomes": dict(outcomes), "incidents": dict(incidents)}

    def take(self, outcomes: Mapping[str, int], incidents: Mapping[str, float]) -> dict[str, float]:
        """Return the counts since the last call, by metric name; the first call counts from construction."""
        ended: collections.Counter[str] = collections.Counter()
        earlier = self.before["incidents"]
        for key, count in (
            collections.Counter(outcomes) - collections.Counter(self.before["outcomes"])
        ).items():
            status, _, reason = key.partition(":")
            ended[f"outcome_{reason}"] += count
            ended["episodes_discarded"] += count if status == "discarded" else 0
        values = {name: float(count - earlier[name]) for name, count in incidents.items()}
        values["tasks_quarantined"] = float(incidents["tasks_quarantined"])
        # Zero by default: a metric that appears only after a fault would be missing from the plots.
        values |= {"episodes_discarded": 0.0} | {name: float(count) for name, count in ended.items()}
        self.before = {"outcomes": dict(outcomes), "incidents": dict(incidents)}
        return values
