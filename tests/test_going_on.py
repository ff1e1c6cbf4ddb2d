"""What a run refuses when it goes on, from where it goes on, and how soon it stops."""

import dataclasses
import fcntl
import os
import shutil
import signal
import time

import pytest
import yaml

from empg_jax import trainer
from empg_jax.errors import Interrupted
from empg_jax.metrics import read_metrics
from empg_jax.run.process import StopRequest
from empg_jax.types import Outcome, Status
from tests import runs
from tests.test_faults import _call, _wait_for, opened, summary_of, told  # noqa: F401

HOUSE = [*runs.HOUSE, "sft.updates=0", "eval.tasks=2"]
STEADY = [*HOUSE, "rollout.deterministic=true"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with all of its checkpoints; tests that change it take a copy."""
    return runs.train(tmp_path_factory.mktemp("going_on") / "whole", *STEADY, "checkpoint.keep=9")


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copied")


def test_an_edited_configuration_is_refused_with_the_keys_that_differ(copied):
    path = copied / "config.yaml"
    values = yaml.safe_load(path.read_text())
    rate = values["train"]["learning_rate"]
    values["train"]["learning_rate"] = 0.25
    values["env"]["options"] = {"latency": 0.5}
    values["log"]["transcripts"] = 1  # this one is free
    values["train"]["updates"] = 4
    path.write_text(yaml.safe_dump(values))
    before = sorted(p.name for p in copied.iterdir())
    code, err = _call("train", "--resume", copied)
    assert code == 2 and "Traceback" not in err
    assert f"train.learning_rate=0.25 (was {rate})" in err and "log.transcripts" not in err
    assert "env.options={'latency': 0.5} (was {})" in err and "updates=" not in err
    assert sorted(p.name for p in copied.iterdir()) == before  # nothing was written


@pytest.mark.slow
def test_a_run_goes_back_to_a_named_checkpoint(copied, whole):
    code, err = _call("train", "--resume", copied, "--step", "7")
    assert code == 2 and "has no checkpoint 7; it has: 0, 1, 2, 3" in err
    code, err = _call("train", "quickstart", "--step", "7")
    assert code == 2 and "--resume RUN" in err
    code, err = _call("train", "--resume", copied, "--step", "1", "log.progress=false")
    assert code == 0, err
    assert told(copied, "went_back", "step", "set_aside") == [(1, [2, 3])]
    assert runs.lines(copied) == runs.lines(whole) and runs.weights(copied) == runs.weights(whole)
    names = sorted(path.name for path in (copied / "checkpoints").iterdir())
    assert names == ["0", "1", "2", "2.aside", "3", "3.aside"]
    assert summary_of(copied)["updates"] == 3


@pytest.mark.slow
def test_a_run_saves_on_time_as_well_as_on_schedule(tmp_path):
    options = ["checkpoint.every=25", "checkpoint.keep=9"]
    run = runs.train(tmp_path / "run", *HOUSE, *options, "checkpoint.seconds=0.001")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["0", "1", "2", "3"]


@pytest.mark.slow
def test_the_best_and_the_last_good_checkpoint_are_kept(tmp_path, opened):  # noqa: F811
    success = {0: 0.1, 1: 0.9, 2: 0.2, 3: 0.3, 4: 0.4}

    def change(parts):
        run = parts.evaluator.run

        def rated(params, version, **options):
            result = run(params, version, **options)
            result.metrics["eval_success"] = success.get(version, 0.0)
            return result

        parts.evaluator.run = rated

    opened.changes.append(change)
    options = ["checkpoint.keep=1", "checkpoint.every=25", "eval.every=1", "train.updates=5"]
    run = runs.train(tmp_path / "run", *HOUSE, *options)
    record = runs.restored(run).progress["record"]
    assert (record["best_step"], record["last_good"]) == (1, 1)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1", "5"]


def test_a_second_process_is_refused_and_a_dead_one_is_replaced(copied):
    with (copied / "run.lock").open("w") as file:
        file.write('{"pid": 4711, "host": "here"}')
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        code, err = _call("train", "--resume", copied, "train.updates=4", "log.progress=false")
        assert code == 2 and "is being trained by process 4711 on here" in err
        assert summary_of(copied)["updates"] == 3
    # The file is still there, but the process that held it is gone.
    code, err = _call("train", "--resume", copied, "train.updates=4", "log.progress=false")
    assert code == 0, err
    assert summary_of(copied)["updates"] == 4 and not (copied / "run.lock").exists()


@pytest.mark.slow
def test_a_live_run_is_locked_with_its_process(tmp_path):
    run = tmp_path / "run"
    process = runs.start(runs.command(run, *HOUSE, "train.updates=500", "env.options.latency=0.05"))
    try:
        log = run / "metrics.jsonl"
        _wait_for(lambda: log.exists() and log.stat().st_size > 0, process)
        code, err = _call("train", "--resume", run)
        assert code == 2 and f"process {process.pid} on" in err
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_broken_held_out_task_is_missing_and_the_run_goes_on(tmp_path, opened):  # noqa: F811
    def change(parts):
        advance = parts.evaluator._collector.advance

        def fail(*arguments):
            for attempt, trajectory in advance(*arguments):
                if attempt.task == 1:
                    outcome = Outcome(Status.DISCARDED, "env_error", "no such page")
                    trajectory = dataclasses.replace(trajectory, outcome=outcome)
                yield attempt, trajectory

        parts.evaluator._collector.advance = fail

    opened.changes.append(change)
    run = runs.train(tmp_path / "run", *HOUSE, "eval.every=1", "train.updates=2")
    assert [line.get("eval_missing") for line in read_metrics(run / "metrics.jsonl")] == [1, None]
    summary = summary_of(run)
    assert summary["eval_missing_before"] == summary["eval_missing_after"] == 1
    assert summary["eval_wins_after"][1] == "-"
    assert told(run, "evaluation_task_missing", "task", "reason") == [(1, "env_error")] * 3


@pytest.mark.slow
@pytest.mark.parametrize("when", ["evaluation", "start"])
def test_sigterm_ends_a_run_soon_with_a_checkpoint(tmp_path, when):
    """In the evaluation, which would take minutes here, and while programs are compiled."""
    run = tmp_path / "run"
    options = ["eval.tasks=400", "env.options.latency=0.3"]
    process = runs.start(runs.command(run, *runs.HOUSE, "sft.updates=1", *options))
    there = run / {"evaluation": "sft_metrics.jsonl", "start": "config.yaml"}[when]
    try:
        _wait_for(lambda: there.exists() and there.stat().st_size > 0, process)
        time.sleep(2.0 if when == "evaluation" else 0.5)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
        took = time.monotonic() - began
    finally:
        process.kill()
    assert process.returncode == 143 and "Traceback" not in err, err
    assert took < 40
    assert told(run, "stop_requested", "signal") == [(signal.SIGTERM,)]
    if when == "evaluation":
        assert runs.restored(run).progress["record"]["phase"] == "rl"


@pytest.mark.long
@pytest.mark.slow
def test_a_stop_in_any_evaluation_or_compilation_costs_nothing(tmp_path, monkeypatch, whole):
    """Stopped again and again, at growing distances, the run still equals the one that was not."""
    asked, at = [0], [0]
    real = StopRequest.check

    def check(self):
        asked[0] += 1
        if asked[0] == at[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self)

    monkeypatch.setattr(StopRequest, "check", check)
    run, stops = tmp_path / "run", 0
    for at[0] in (3, 12, 19, 10**6):
        asked[0] = 0
        try:
            if (run / "config.yaml").exists():
                runs.resume(run)
            else:
                runs.train(run, *STEADY, "checkpoint.keep=9")
        except trainer.Stopped:
            stops += 1
    assert stops >= 2 and runs.lines(run) == runs.lines(whole)
    assert runs.weights(run) == runs.weights(whole)


def test_the_check_raises_only_after_a_request():
    stop = StopRequest()
    stop.check()
    stop.set()
    with pytest.raises(Interrupted):
        stop.check()
