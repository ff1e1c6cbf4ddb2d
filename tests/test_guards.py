"""Steps that are left out cost a bounded number of updates, and never the last good checkpoint."""

import json
import math

import jax
import numpy as np
import pytest

from empg_jax.metrics import read_metrics
from empg_jax.report.debug import inspect_dump
from empg_jax.run import guards
from empg_jax.run.checkpoint import CheckpointError
from empg_jax.run.guards import MAX_ROLLBACKS, MAX_SKIPS, TrainingError
from tests import runs

pytestmark = pytest.mark.slow

# The first step of the run ruins the weights; every step after it is left out.
RUIN = [*runs.HOUSE, "sft.updates=0", "train.learning_rate=1e30", "checkpoint.keep=1", "train.updates=9"]


def left_out(run):
    """Update and number of steps of every event about steps that were left out."""
    events = read_metrics(run / "events.jsonl")
    return [(e["update"], e["steps"]) for e in events if e["event"] == "steps_left_out"]


def assert_good(run, step):
    """The checkpoint is there, and the weights in it are those of a policy."""
    state = jax.device_get(runs.restored(run, step).state)
    assert all(np.abs(leaf).max() < 1e3 for leaf in jax.tree.leaves(state.params))


def test_skips_in_a_row_end_the_run_and_the_good_checkpoint_stays(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(TrainingError) as caught:
        runs.train(run, *RUIN, "train.on_nonfinite=skip")
    message, last = str(caught.value), 1 + MAX_SKIPS + 1  # one of the two steps of update 1 was made
    assert f"{MAX_SKIPS + 1} updates in a row made no optimizer step at all" in message
    assert message.startswith(f"update {last}: ") and f"bad_batch_{last}.npz" in message
    assert message.endswith(f"the last good one: empg-jax train --resume {run} --step 0")
    assert left_out(run) == [(1, 1), *((update, 2) for update in range(2, last + 1))]
    assert_good(run, 0)
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    assert steps == [0, last - 1]  # keep=1: the newest, and beside it the good one
    with pytest.raises(TrainingError, match=f"update {last}: "):  # the count goes on after a resume
        runs.resume(run)
    found = inspect_dump(run)  # of the first, which shows the cause
    assert found["update"] == 1 and next(iter(found["leaves"].values()))["largest"] > 1e20


def test_a_fault_stops_the_run(tmp_path):
    with pytest.raises(TrainingError, match=r"update 1: .*checkpoints: \[0\]"):
        runs.train(tmp_path / "run", *RUIN)
    assert_good(tmp_path / "run", 0)


def test_from_the_second_rollback_on_the_good_checkpoint_is_restored(tmp_path, monkeypatch):
    restored, real = [], guards.restore_state

    def restore_state(config, checkpoints, learner, step):
        restored.append((checkpoints.steps[-1], step))
        return real(config, checkpoints, learner, step)

    monkeypatch.setattr(guards, "restore_state", restore_state)
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=f"{MAX_ROLLBACKS} rollbacks in a row did not help"):
        runs.train(run, *RUIN, "train.on_nonfinite=rollback")
    assert restored == [(0, None), (1, 0), (2, 0)]
    assert_good(run, 0)
    assert runs.weights(run) == runs.weights(run, 0)


def test_ruined_weights_are_rolled_back_and_no_disagreement(tmp_path):
    """The only step of update 1 ruins the weights, so that update 2 finds neither samples nor scores."""
    alone = ["train.num_minibatches=1", "algorithm.entropy_source=learner", "train.updates=2"]
    run = runs.train(tmp_path / "run", *RUIN, *alone, "train.on_nonfinite=rollback")
    assert left_out(run) == [(2, 1)]
    assert [e["event"] for e in read_metrics(run / "events.jsonl")].count("rollback") == 1


def test_a_ruined_run_that_ends_in_time_has_results_in_strict_json(tmp_path):
    run = runs.train(tmp_path / "run", *RUIN, "train.on_nonfinite=skip", "train.updates=3")

    def refuse(name):
        raise AssertionError(f"{name} in summary.json")

    summary = json.loads((run / "summary.json").read_text(), parse_constant=refuse)
    assert summary["eval_entropy_after"] is None and math.isfinite(summary["eval_entropy_before"])
    assert summary["updates"] == 3 and (run / "curves.png").exists()


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    """The first step makes infinite weights from a finite gradient."""
    run, steep = tmp_path / "run", ["train.learning_rate=1e38", "train.weight_decay=1e3"]
    with pytest.raises(CheckpointError, match=r"not finite; usable: \[0\]"):
        runs.train(run, *RUIN, *steep, "train.on_nonfinite=skip")
    assert_good(run, 0)
    assert runs.restored(run).step == 0


def test_updates_without_a_token_to_train_on_are_told_and_are_no_fault(tmp_path, capsys):
    """No response of the untrained policy is a valid action."""
    keys = ["sft.updates=0", "algorithm.drop_void=trajectory", "train.schedule=linear", "train.updates=5"]
    run = runs.train(tmp_path / "run", *runs.HOUSE, *keys)
    lines = runs.lines(run)
    assert [(line["optimizer_steps"], line["empty_steps"]) for line in lines] == [(0, 2)] * 5
    assert len({line["learning_rate"] for line in lines}) == 1  # the schedule counts the steps made
    assert runs.weights(run) == runs.weights(run, 0) and runs.restored(run).state.step == 0
    (event,) = [e for e in read_metrics(run / "events.jsonl") if e["event"] == "updates_empty"]
    assert (event["update"], event["keys"]) == (MAX_SKIPS, ["algorithm.drop_void=trajectory"])
    told = f"update {MAX_SKIPS}: {MAX_SKIPS} updates in a row had no token to train on"
    assert capsys.readouterr().err.count(told) == 1


def test_a_warm_start_that_diverges_ends_with_a_message(tmp_path):
    options = ["sft.learning_rate=1e30", "sft.updates=4"]
    with pytest.raises(
        TrainingError, match=r"the loss of warm-start update \d is .*: lower sft.learning_rate"
    ):
        runs.train(tmp_path / "run", *runs.HOUSE, *options)
