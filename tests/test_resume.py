"""A run that was stopped or killed, and resumed, equals the run that was not: bit for bit."""

import random
import signal
import time

import jax
import optax
import pytest

from empg_jax import trainer
from empg_jax.errors import ConfigError
from empg_jax.learner import passes
from empg_jax.metrics import read_metrics
from empg_jax.rollout.schedule import read_schedule
from empg_jax.run import evaluating
from empg_jax.run.consumed import read_consumed
from empg_jax.run.saved import open_saved
from tests import runs
from tests.moments import Moments

STEADY = [*runs.HOUSE, "rollout.deterministic=true", "checkpoint.keep=9", "log.rollouts_every=1"]


@pytest.fixture
def stop_at(monkeypatch):
    """Runs are stopped at the given moment, counted from now."""
    moments = Moments(monkeypatch)

    def set_stop(at):
        moments.at, moments.passed = at, 0

    return set_stop


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that was never stopped, and the number of its moments."""
    with pytest.MonkeyPatch.context() as patch:
        moments = Moments(patch)
        run = runs.train(tmp_path_factory.mktemp("resume") / "whole", *STEADY)
        return run, moments.passed


def assert_same(run, other):
    """A run that was given more updates keeps one held-out point more, that of its first end."""
    assert trained(run) == trained(other)
    assert runs.weights(run) == runs.weights(other)
    assert rollouts(run) == rollouts(other)
    consumed = list(read_consumed(run))
    assert consumed == list(read_consumed(other))
    assert [(line["update"], line["group_id"]) for line in consumed] == [(n // 2 + 1, n) for n in range(6)]
    assert all(line["members"] == [0, 1] and line["version_max"] == line["update"] - 1 for line in consumed)


def trained(run):
    """The run's metrics of training."""
    return [{k: v for k, v in line.items() if not k.startswith("eval_")} for line in runs.lines(run)]


def rollouts(run):
    """Every file of training episodes, by name."""
    return {path.name: path.read_bytes() for path in (run / "rollouts").iterdir()}


@pytest.mark.long
@pytest.mark.slow
def test_the_same_run_twice_is_the_same(whole, tmp_path):
    assert_same(runs.train(tmp_path / "run", *STEADY), whole[0])
    assert any(line["tokens_shared"] for line in runs.lines(whole[0]))  # of attempts at a task


@pytest.mark.long
@pytest.mark.slow
def test_an_adaptive_sampler_draws_the_same_after_a_stop(tmp_path, stop_at, whole):
    adaptive = [*STEADY, "env.sampler=adaptive", "sft.updates=0", "eval.tasks=2", "train.updates=5"]
    run = runs.train(tmp_path / "run", *adaptive)
    stop_at(whole[1] // 2)
    with pytest.raises(trainer.Stopped):
        runs.train(tmp_path / "again", *adaptive)
    stop_at(None)
    cut_short = len(list(read_consumed(tmp_path / "again")))
    runs.resume(tmp_path / "again")
    consumed = list(read_consumed(run))
    assert 0 < cut_short < len(consumed) == 10
    assert list(read_consumed(tmp_path / "again")) == consumed
    assert runs.lines(tmp_path / "again") == runs.lines(run)
    uniform = [line["task"] for line in read_consumed(whole[0])]
    assert [line["task"] for line in consumed][: len(uniform)] != uniform
    # What the last checkpoint remembers are the groups that were trained on.
    solved = runs.restored(run).progress["ledger"]["solved"]
    assert sorted(task for task, _, _ in solved) == sorted({line["task"] for line in consumed})


BY_HAND = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize(
    "share",
    [
        pytest.param(0.0, marks=BY_HAND),
        pytest.param(0.12, marks=BY_HAND),
        0.3,
        pytest.param(0.6, marks=BY_HAND),
        pytest.param(1.0, marks=BY_HAND),
    ],
)
def test_stopped_and_resumed_equals_uninterrupted(whole, tmp_path, stop_at, share):
    """The first moments are in the warm start, the others in the middle of collection."""
    run, count = whole
    stop_at(max(1, round(share * count)))
    with pytest.raises(trainer.Stopped, match="stopped by signal 15; go on with: empg-jax train --resume"):
        runs.train(tmp_path / "run", *STEADY)
    stop_at(None)
    runs.resume(tmp_path / "run")
    assert_same(tmp_path / "run", run)
    events = read_metrics(tmp_path / "run" / "events.jsonl")
    assert [(event["event"], event["signal"]) for event in events] == [("stop_requested", signal.SIGTERM)]


@pytest.mark.long
@pytest.mark.slow
def test_a_warm_start_goes_on_where_the_critic_has_settings_of_its_own(tmp_path, stop_at):
    """The optimizer of the warm start has a state of another structure than that of RL."""
    options = [
        *STEADY,
        "algorithm.name=ppo",
        "algorithm.modulation=none",
        "algorithm.critic.learning_rate=1e-3",
    ]
    options += ["train.updates=1", "eval.tasks=2"]
    whole = runs.train(tmp_path / "whole", *options)
    stop_at(1)
    with pytest.raises(trainer.Stopped):
        runs.train(tmp_path / "run", *options)
    stop_at(None)
    assert runs.restored(tmp_path / "run").progress["record"]["sft_update"] == 1
    assert open_saved(tmp_path / "run", [], pytest.fail).step == 0
    runs.resume(tmp_path / "run")
    assert runs.lines(tmp_path / "run") == runs.lines(whole)
    assert runs.weights(tmp_path / "run") == runs.weights(whole)


@pytest.mark.long
@pytest.mark.slow
def test_a_run_goes_on_with_its_engine_on_other_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "GAP_CHECK_EVERY", 1)
    run = runs.train(tmp_path / "run", *STEADY, "sft.updates=0", "train.updates=1", "eval.tasks=2")
    runs.resume(run, "train.updates=2", "rollout.tensor=2", "rollout.data=2")
    runs.resume(run, "train.updates=3", "rollout.tensor=1", "rollout.devices=2", "rollout.release=true")
    lines = runs.lines(run)
    assert [line["update"] for line in lines] == [1, 2, 3]
    # The sampler on its new devices has the weights of the learner.
    assert all(line["logprob_gap"] < 1e-4 for line in lines)


@pytest.mark.slow
def test_a_run_goes_on_over_another_mesh_with_passes_that_fit_it(whole, tmp_path):
    run = runs.train(tmp_path / "run", *STEADY, "train.updates=1")
    with pytest.raises(ConfigError, match=r"mesh\.fsdp=8 cannot divide: use train\.micro_tokens=768"):
        runs.resume(run, "train.updates=2", "mesh.fsdp=8")
    runs.resume(run, "train.updates=2", "mesh.fsdp=8", "train.micro_tokens=768")
    runs.resume(run, "train.updates=3", "mesh.fsdp=1", "train.share_prefix=true")
    for ours, theirs in zip(runs.lines(run), runs.lines(whole[0]), strict=True):
        assert ours["tokens_sampled"] == theirs["tokens_sampled"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3, abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@pytest.mark.long
@pytest.mark.slow
def test_a_run_goes_on_from_another_folder_than_it_began_in(tmp_path, stop_at, monkeypatch):
    options = [*STEADY, "checkpoint.dir=place", "train.updates=1", "eval.tasks=2"]
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    stop_at(1)
    with pytest.raises(trainer.Stopped):
        runs.train(tmp_path / "run", *options)
    stop_at(None)
    log = tmp_path / "run" / "sft_metrics.jsonl"
    before = read_metrics(log)
    monkeypatch.chdir(tmp_path / "there")
    runs.resume(tmp_path / "run")
    assert list((tmp_path / "there").iterdir()) == []
    assert runs.restored(tmp_path / "run").step == 1
    after = read_metrics(log)  # the first update was not made again
    assert [line["update"] for line in after] == [0, 1] and after[:1] == before


@pytest.mark.long
@pytest.mark.slow
def test_what_was_counted_between_two_lines_survives_a_stop(tmp_path, stop_at):
    """Counts are those since the last line, also where a run was resumed between two lines."""
    options = [*STEADY, "sft.updates=0", "eval.tasks=2", "log.every=3", "train.updates=4"]
    whole = runs.train(tmp_path / "whole", *options)
    steps = [line["environment_steps"] for line in runs.lines(whole)]
    stop_at(8)
    with pytest.raises(trainer.Stopped):
        runs.train(tmp_path / "run", *options)
    stop_at(None)
    stopped = runs.restored(tmp_path / "run")
    assert stopped.step in (1, 2)  # no line is written by then
    runs.resume(tmp_path / "run")
    assert runs.lines(tmp_path / "run") == runs.lines(whole)
    assert [line["update"] for line in runs.lines(whole)] == [3, 4] and steps[0] > steps[1]


@pytest.mark.long
@pytest.mark.slow
def test_stopped_twice(whole, tmp_path, stop_at):
    stop_at(2)
    with pytest.raises(trainer.Stopped):
        runs.train(tmp_path / "run", *STEADY)
    stop_at(5)
    with pytest.raises(trainer.Stopped):
        runs.resume(tmp_path / "run")
    stop_at(None)
    runs.resume(tmp_path / "run")
    assert_same(tmp_path / "run", whole[0])


@pytest.mark.slow
def test_a_finished_run_may_be_given_more_updates(whole, tmp_path):
    runs.train(tmp_path / "run", *STEADY, "train.updates=2")
    runs.resume(tmp_path / "run", "train.updates=3")
    assert_same(tmp_path / "run", whole[0])


@pytest.mark.slow
def test_a_new_length_tells_the_learning_rate_that_the_run_goes_on_with(tmp_path, capfd):
    """The note's rates are those of the metrics, and of the run that had been planned."""
    linear = ["train.schedule=linear", "train.final_learning_rate=1e-5", "sft.updates=0", "eval.tasks=2"]
    run = runs.train(tmp_path / "run", *STEADY, *linear, "train.updates=1")
    runs.resume(run, "train.updates=2")
    note = (
        "note: train.updates=2 (was 1) changes the length of train.schedule=linear: the learning rate goes on"
    )
    assert f"{note} at 0.000505, where 1e-05 was next" in capfd.readouterr().err
    assert [line["learning_rate"] for line in runs.lines(run)] == pytest.approx([1e-3, 5.05e-4])
    runs.resume(run, "train.updates=2")
    assert "changes the length" not in capfd.readouterr().err


@pytest.mark.long
@pytest.mark.slow
def test_narrow_moments_go_on_bit_by_bit(tmp_path):
    narrow = [*STEADY, "sft.updates=0", "eval.tasks=2", "train.moments=bfloat16"]
    run = runs.train(tmp_path / "run", *narrow)
    runs.train(tmp_path / "again", *narrow, "train.updates=2")
    runs.resume(tmp_path / "again", "train.updates=3")
    assert_same(tmp_path / "again", run)
    adam = optax.tree_utils.tree_get(runs.restored(run).state.opt_state, "mu")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adam)} == {"bfloat16"}


@pytest.mark.slow
def test_without_determinism_a_resumed_run_still_trains_every_group_once(tmp_path, stop_at):
    """Data in flight is sampled again, what was finished is kept, and nothing is trained twice."""
    options = ["train.max_lag=1", "algorithm.entropy_source=learner"]
    stop_at(6)
    with pytest.raises(trainer.Stopped):
        runs.train(tmp_path / "run", *runs.HOUSE, *options)
    stop_at(None)
    schedule = tmp_path / "run" / "schedule.jsonl"
    before = schedule.read_text()
    run = runs.resume(tmp_path / "run")
    starts = {f'{{"start": {n}}}' for n in range(3)}
    assert set(schedule.read_text().removeprefix(before).splitlines()) <= starts
    with pytest.raises(ConfigError, match="never resumed"):
        read_schedule(schedule)
    assert [line["update"] for line in runs.lines(run)] == [1, 2, 3]
    assert all(line["episodes_trained"] == 4 and line["lag"] <= 1 for line in runs.lines(run))
    # What the engine did for episodes that waited in the checkpoint is in the line of their update.
    sampled, trained = (
        sum(line[name] for line in runs.lines(run)) for name in ("tokens_sampled", "tokens_trained")
    )
    assert sampled >= trained


@pytest.mark.slow
@pytest.mark.parametrize("when", [pytest.param("warm start", marks=pytest.mark.long), "rl"])
def test_killed_at_a_random_moment_and_resumed(whole, tmp_path, when):
    """SIGKILL leaves no time to save: the run goes on from its newest checkpoint, or from its start."""
    run = tmp_path / "run"
    # Slow environments make room for the kill; what they answer is the same.
    process = runs.start(runs.command(run, *STEADY, "env.options.latency=0.05"))
    log = run / {"warm start": "sft_metrics.jsonl", "rl": "metrics.jsonl"}[when]
    try:
        _wait_for(lambda: log.exists() and log.stat().st_size > 0, process)
        time.sleep(random.uniform(0, 0.5) if when == "rl" else 0)
    finally:
        process.kill()
        process.communicate()
    assert not (run / "summary.json").exists(), "the run was over before it was killed"
    runs.resume(run)
    assert_same(run, whole[0])
    assert sft_updates(run) == [0, 1]


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_begins_anew(whole, tmp_path, monkeypatch):
    class KilledError(Exception):
        pass

    def die(*_):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "save", die)
        with pytest.raises(KilledError):
            runs.train(tmp_path / "run", *STEADY)
    runs.resume(tmp_path / "run")
    assert_same(tmp_path / "run", whole[0])
    assert sft_updates(tmp_path / "run") == [0, 1]


def sft_updates(run):
    return [line["update"] for line in read_metrics(run / "sft_metrics.jsonl")]


def _wait_for(is_there, process, seconds=120):
    end = time.monotonic() + seconds
    while not is_there():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"the run ended or hung ({process.returncode}): {process.communicate()[1]}")
        time.sleep(0.01)
