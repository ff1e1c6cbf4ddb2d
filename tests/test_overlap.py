"""Rollouts beside the learner: through the command's configuration, to what a run then does."""

import jax
import pytest

from empg_jax import trainer
from empg_jax.errors import ConfigError, RunError
from empg_jax.metrics import read_metrics
from empg_jax.rollout.schedule import read_schedule
from empg_jax.run.consumed import read_consumed
from empg_jax.run.parts import open_run
from tests import runs

pytestmark = pytest.mark.slow

LAG = ["train.max_lag=2", "env.options.latency=0.01", "train.updates=6", "eval.every=2"]


def test_a_run_with_a_lag_trains_every_group_once_and_says_how_it_went(tmp_path):
    """The quickstart's own entropies are the sampler's: the lag alone changes what must change."""
    run = runs.train(tmp_path / "run", *runs.HOUSE, *LAG)
    lines = read_metrics(run / "metrics.jsonl")
    assert len(lines) == 6 and any(line["lag"] > 0 for line in lines)
    for line in lines:
        shares = {name: value for name, value in line.items() if name.startswith("lag_share_")}
        assert sum(shares.values()) == pytest.approx(1.0)
        assert f"lag_share_{line['lag_max']:.0f}" in shares and line["lag_max"] <= 2
        assert 0 <= line["rollout_idle"] <= 1 and 0 <= line["learner_idle"] <= 1
        assert line["publish_pause"] >= 0 and line["tokens_wasted"] == 0 and line["recompiles"] == 0
    consumed = list(read_consumed(run))
    assert sorted(line["group_id"] for line in consumed) == list(range(12))
    assert all(line["update"] - 1 - line["version_min"] <= 2 for line in consumed)
    # Evaluations in between took the environment workers from the rollouts, and gave them back.
    assert [line["update"] for line in lines if "eval_success" in line] == [2, 4]


@pytest.mark.parametrize("limit", [pytest.param(0.0, marks=pytest.mark.long), 10.0])
def test_new_weights_inside_responses_are_versioned_measured_and_bounded(tmp_path, limit):
    options = ["rollout.publish=burst", f"rollout.max_stale_gap={limit}", "rollout.burst=1"]
    lengths = ["rollout.max_response_tokens=32", "rollout.max_tokens=160", "train.micro_tokens=320"]
    sizes = [
        "rollout.tasks_per_update=4",
        "train.learning_rate=0.01",
        "train.updates=8",
        "env.options.latency=0",
    ]
    run = runs.train(tmp_path / "run", *runs.HOUSE, *LAG, *options, *lengths, *sizes, "sft.updates=0")
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "stale_gap" in line]
    assert lines and all(line["recompiles"] == 0 for line in lines)
    assert max(line["stale_gap"] for line in lines) > 0
    assert any(line["stale_refills"] for line in lines) == (limit == 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["rollout.publish=burst"], r"publish=burst has no effect with train\.max_lag=0"),
        (["train.max_lag=1", "rollout.max_stale_gap=0.1"], r"max_stale_gap=0\.1 has no effect"),
    ],
)
def test_settings_of_publication_without_effect_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        runs.configure(tmp_path / "run", *options)


def test_a_run_with_a_lag_is_repeated_bit_by_bit_from_its_schedule(tmp_path):
    """Environments of other speed, and a learner that is slower: the order of events is the first run's.

    Evaluations are asked as environments answer, so that rounding may differ in them, and in them alone.
    """
    sizes = ["rollout.tasks_per_update=4", "rollout.slots=6", "sft.updates=0", "checkpoint.keep=9"]
    first = runs.train(tmp_path / "first", *runs.HOUSE, *LAG, *sizes)
    repeat = ["rollout.deterministic=true", f"rollout.schedule={first}/schedule.jsonl"]
    second = runs.train(tmp_path / "second", *runs.HOUSE, *LAG, *sizes, *repeat, "env.options.latency=0.03")
    assert [_training(line) for line in runs.lines(second)] == [_training(line) for line in runs.lines(first)]
    assert runs.weights(second) == runs.weights(first)
    assert list(read_consumed(second)) == list(read_consumed(first))
    for line, other in zip(runs.lines(first), runs.lines(second), strict=True):
        assert other == pytest.approx(line, rel=1e-5)
    assert any(line["lag"] > 0 for line in runs.lines(first))
    assert any(line["tokens_shared"] for line in runs.lines(first))
    with pytest.raises(RunError, match=r"the run differs from its schedule|should answer in this round"):
        runs.train(tmp_path / "third", *runs.HOUSE, *LAG, *sizes, *repeat, "seed=1")


def _training(line):
    return {name: value for name, value in line.items() if not name.startswith("eval_")}


def test_a_schedule_that_cannot_be_repeated_is_refused(tmp_path):
    repeat = ["train.max_lag=2", "rollout.deterministic=true"]
    with pytest.raises(ConfigError, match="to repeat a run"):
        runs.configure(tmp_path, *repeat)
    with pytest.raises(ConfigError, match=r"needs rollout\.deterministic=true"):
        runs.configure(tmp_path, "rollout.schedule=x.jsonl")
    path = tmp_path / "schedule.jsonl"
    for text, message in (
        (None, "cannot be read"),
        ("{", "is not a schedule"),
        ('{"start": 0}\n{"start": 3}\n', r"never resumed can be repeated; .* updates \[0, 3\]"),
    ):
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            list(read_schedule(path))


@pytest.mark.slow
def test_the_engine_gets_devices_of_its_own(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(trainer, "open_run", lambda *a, **k: opened.append(open_run(*a, **k)) or opened[-1])
    options = ["rollout.devices=2", "rollout.data=2", "mesh.data=2", "train.updates=2"]
    runs.train(tmp_path / "run", *runs.HOUSE, *options)
    parts, run = opened[0]
    ours = {device.id for leaf in jax.tree.leaves(run.state.params) for device in leaf.devices()}
    theirs = {device.id for leaf in jax.tree.leaves(parts.engine._params) for device in leaf.devices()}
    assert len(ours) == len(theirs) == 2 and not ours & theirs


def test_devices_that_leave_none_for_the_learner_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"rollout\.devices=8 leaves the learner none of the 8 devices"):
        runs.train(tmp_path / "run", "rollout.devices=8")
    assert not (tmp_path / "run").exists()
