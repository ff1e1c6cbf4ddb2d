"""Counts of faults and waste: since the start of a run, and since the last line of metrics."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

from empg_jax.rollout.ledger import Ledger
from empg_jax.workers.pool import EnvPool

# Counts that begin with every process; the ledger's belong to the run.
OF_PROCESS = ("worker_restarts", "episodes_recovered", "breaker_seconds")


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
      saved: the state of the meter to go on from; None starts at the counts above.

    Attributes:
      state: the counts at the last call, and the incidents at the last look, in JSON types.
    """

    def __init__(
        self,
        outcomes: Mapping[str, int],
        incidents: Mapping[str, float],
        saved: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.state: dict[str, dict[str, Any]] = {"outcomes": dict(outcomes), "incidents": dict(incidents)}
        if saved is not None:
            # What the ended process had counted since the last call counts on from what this one has counted.
            start = {name: incidents[name] - saved["seen"].get(name, 0) for name in OF_PROCESS}
            before = {name: saved["incidents"].get(name, count) for name, count in incidents.items()}
            before = {name: count + start.get(name, 0) for name, count in before.items()}
            self.state = {"outcomes": dict(saved["outcomes"]), "incidents": before}
        self.look(incidents)

    def look(self, incidents: Mapping[str, float]) -> None:
        """Remember the counts of an update without a line, which a resumed run adds to its next line."""
        self.state["seen"] = dict(incidents)

    def take(self, outcomes: Mapping[str, int], incidents: Mapping[str, float]) -> dict[str, float]:
        """Return the counts since the last call, by metric name; the first call counts from construction."""
        before = self.state["incidents"]
        ended: collections.Counter[str] = collections.Counter()
        for key, count in (
            collections.Counter(outcomes) - collections.Counter(self.state["outcomes"])
        ).items():
            status, _, reason = key.partition(":")
            ended[f"outcome_{reason}"] += count
            ended["episodes_discarded"] += count if status == "discarded" else 0
        values = {name: float(count - before[name]) for name, count in incidents.items()}
        values["tasks_quarantined"] = float(incidents["tasks_quarantined"])
        # Zero by default: a metric that appears only after a fault would be missing from the plots.
        values |= {"episodes_discarded": 0.0} | {name: float(count) for name, count in ended.items()}
        self.state = {"outcomes": dict(outcomes), "incidents": dict(incidents)}
        self.look(incidents)
        return values
