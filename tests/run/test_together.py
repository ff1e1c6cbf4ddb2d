"""What several hosts tell of one update: counts are summed, a maximum stays one; and their evaluation."""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest

from empg_jax.engine.engine import EngineStats
from empg_jax.errors import RunError
from empg_jax.parallel.hosts import ALONE
from empg_jax.run.evaluating import evaluate
from empg_jax.run.together import join_deliveries


def test_the_engines_counts_are_summed_and_the_largest_use_of_pages_is_kept():
    def part(use):
        engine = EngineStats(sampled_tokens=7, bursts=1, page_use=use)
        counts = {"update": 0, "metrics": {}, "outcomes": {"trained:won": 2}, "incidents": {}}
        return counts | {"engine": dataclasses.asdict(engine)}, []

    joined = join_deliveries([part(0.9), part(0.5)])
    assert joined.engine == EngineStats(sampled_tokens=14, bursts=2, page_use=0.9)
    assert joined.outcomes == {"trained:won": 4}


def test_of_an_outage_that_hosts_share_the_longest_one_counts():
    def part(seconds):
        counts = {"worker_restarts": 2, "breaker_seconds": seconds}
        values = {"update": 0, "metrics": {}, "outcomes": {}, "incidents": counts}
        return values | {"engine": dataclasses.asdict(EngineStats())}, []

    joined = join_deliveries([part(seconds) for seconds in (58.0, 60.0, 0.0)])
    assert joined.incidents == {"worker_restarts": 6, "breaker_seconds": 60.0}


def test_weights_are_gathered_for_an_evaluation_before_one_hosts_rollouts_can_fail():
    """The others would wait for its part of them for ever."""
    placed = []

    def fail(play):
        assert placed == ["weights"]
        raise RunError("the rollout thread has ended")

    parts = SimpleNamespace(
        evaluator=SimpleNamespace(run=lambda *args, **options: None),
        progress=None,
        clock=SimpleNamespace(phase=lambda name: contextlib.nullcontext()),
        engine=SimpleNamespace(place=placed.append),
        rollout=SimpleNamespace(call=fail),
        hosts=ALONE,
        check_stop=lambda: None,
        should_stop=None,
    )
    run = SimpleNamespace(state=SimpleNamespace(params="weights"), update=3)
    with pytest.raises(RunError, match="the rollout thread has ended"):
        evaluate(parts, run, "during")
