"""Counts since the last line, in a run of one process or of several."""

import json

from empg_jax.rollout.incidents import IncidentMeter

NAMES = ("worker_restarts", "episodes_recovered", "groups_failed", "tokens_wasted", "environment_steps")


def counts(*numbers, quarantined=0):
    values = dict(zip(NAMES, map(float, numbers), strict=True))
    return values | {"breaker_seconds": 0.0, "tasks_quarantined": quarantined}


def test_counts_are_those_since_the_last_call():
    meter = IncidentMeter({"trained:won": 1}, counts(1, 0, 0, 0, 5))
    line = meter.take({"trained:won": 3, "discarded:timeout": 1}, counts(1, 1, 0, 7, 15, quarantined=2))
    assert line.items() >= counts(0, 1, 0, 7, 10, quarantined=2).items()
    assert (line["outcome_won"], line["outcome_timeout"], line["episodes_discarded"]) == (2, 1, 1)
    line = meter.take({"trained:won": 3, "discarded:timeout": 1}, counts(1, 1, 0, 7, 15))
    assert set(line.values()) == {0.0} and "outcome_won" not in line


def test_a_resumed_run_counts_from_its_last_line():
    """The counts of the ledger go on. Those of the workers begin anew with each process."""
    meter = IncidentMeter({}, counts(0, 0, 0, 0, 0))
    meter.take({"trained:won": 4}, counts(2, 1, 1, 10, 40))
    meter.look(counts(5, 2, 2, 30, 60))  # an update without a line, at whose end the run is stopped
    for started, ended in [(1, 2), (0, 0)]:
        saved = json.loads(json.dumps(meter.state))
        meter = IncidentMeter({"trained:won": 6}, counts(started, 0, 2, 30, 60), saved)
        meter.look(counts(ended, 0, 2, 30, 60))
    line = meter.take({"trained:won": 9}, counts(4, 1, 3, 35, 90))
    # Restarts: 3 before the first stop, 1 before the second one, 4 after it.
    assert line.items() >= counts(8, 2, 2, 25, 50).items() and line["outcome_won"] == 5
