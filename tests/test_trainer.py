"""Whole runs: what they leave behind, and the variants of the loop."""

import errno
import json
import re
import sys
import weakref

import numpy as np
import pytest

from empg_jax import trainer
from empg_jax.config import load_config
from empg_jax.errors import ConfigError, Interrupted
from empg_jax.evaluate import evaluate_run
from empg_jax.metrics import read_metrics
from empg_jax.report import events
from empg_jax.run.saved import open_saved
from tests import runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run in the real household."""
    return runs.train(tmp_path_factory.mktemp("trainer") / "run", "log.tensorboard=true")


def test_a_run_leaves_its_files(run):
    names = {path.name for path in run.iterdir()}
    assert names >= {
        *("config.yaml", "environment.json", "metrics.jsonl", "sft_metrics.jsonl", "summary.json"),
        *("curves.png", "view.html", "tokenizer", "checkpoints", "tensorboard"),
        *("events.jsonl", "rollouts", "eval"),
    }
    assert load_config(run / "config.yaml") == runs.configure(run, "log.tensorboard=true")
    environment = json.loads((run / "environment.json").read_text())
    assert environment["seed"] == 0 and environment["packages"]["jax"]
    assert environment["rows"] == "rows per episode: 1"
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert 'id="data-update-000003.0"' in (run / "view.html").read_text()  # its look: tests/run/test_view.py
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1", "2", "3"]  # keep=3


def test_every_update_is_one_line(run):
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["update"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["episodes_trained"] == 4 and line["lag"] == 0 and line["nonfinite_steps"] == 0
        assert line["optimizer_steps"] == 2  # num_minibatches, however well the episodes pack
        assert line["recompiles"] == 0 and 0 < line["entropy"] < np.log(200)
        assert line["grad_norm"] > 0 and line["tokens_trained"] == line["tokens_sampled"] > 0
        # Nothing was thrown away, so that what was played is what was trained on.
        assert line["environment_steps"] == line["episodes_trained"] * line["episode_turns"]
        assert line["cpu_seconds"] > 0
    assert [line["update"] for line in read_metrics(run / "sft_metrics.jsonl")] == [0, 1]
    # A checkpoint is written behind its update's line, so the next line has its time.
    assert ["seconds_checkpoint" in line for line in lines] == [False, True, True]
    assert not any("seconds_sft" in line or "seconds_start" in line for line in lines)


def test_the_summary_says_what_happened(run):
    summary = json.loads((run / "summary.json").read_text())
    lines = read_metrics(run / "metrics.jsonl")
    assert summary["eval_tasks"] == 8 and summary["updates"] == 3
    assert len(summary["weights_before"]) == 16
    assert 0 <= summary["eval_success_before"] <= 1 and 0 <= summary["eval_success_after"] <= 1
    assert summary["eval_entropy_before"] != summary["eval_entropy_after"]
    assert summary["recompiles_after_warmup"] == 0
    assert summary["tokens_sampled"] == sum(line["tokens_trained"] for line in lines)
    assert sum(summary["trajectories"].values()) == 3 * 4
    assert all(key.partition(":")[0] in ("trained", "scored_zero") for key in summary["trajectories"])
    phases = dict(summary["wall_seconds"])
    total = phases.pop("total")
    assert phases.keys() == {"start", "sft", "eval", "publish", "rollout", "update", "checkpoint"}
    assert total == pytest.approx(sum(phases.values()), abs=0.01)


def test_a_run_and_each_of_its_checkpoints_can_be_evaluated(run):
    summary = json.loads((run / "summary.json").read_text())
    after = evaluate_run(run, [])
    assert (after["step"], after["eval_tasks"], after["split"]) == (3, 8, "test")
    assert after["eval_success"] == summary["eval_success_after"]
    assert after["eval_entropy"] == pytest.approx(summary["eval_entropy_after"], rel=1e-5)
    first = evaluate_run(run / "checkpoints" / "1", ["eval.tasks=3", "env.eval_split=valid"])
    assert (first["step"], first["eval_tasks"], first["split"]) == (1, 3, "valid")


def test_a_folder_is_not_used_twice(run):
    with pytest.raises(Exception, match="already holds a run: go on with --resume"):
        runs.train(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["algorithm.entropy_source=learner"], {"logprob_gap"}),
        # One step: the KL is measured before it, so that of the first update is zero.
        (["algorithm.kl_coef=0.1", "train.num_minibatches=1"], {"kl", "logprob_gap"}),
        (["train.epochs=2", "eval.every=2"], {"eval_success"}),
        (["env.context=window", "env.history=1", "algorithm.modulation=aem"], set()),
    ],
    ids=["learner", "kl", "epochs", "window"],
)
def test_variants_of_the_loop(tmp_path, monkeypatch, overrides, expected):
    """Household that pays at random: every estimator has something to do."""
    passes, update_policy = [], trainer.update_policy

    def update(*args):
        assert not [each for each in passes if each()]  # one batch is on the devices at a time
        result = update_policy(*args)
        passes.append(weakref.ref(result[0]))
        return result

    monkeypatch.setattr(trainer, "update_policy", update)
    run = runs.train(tmp_path / "run", *runs.HOUSE, *overrides)
    lines = read_metrics(run / "metrics.jsonl")
    assert json.loads((run / "summary.json").read_text())["recompiles_after_warmup"] == 0
    assert [line["update"] for line in lines] == [1, 2, 3]
    told = json.loads((run / "environment.json").read_text())["rows"]
    assert ("one per turn" in told) == ("env.context=window" in overrides)
    assert any(line["mixed_groups"] > 0 for line in lines)
    assert all(line["grad_norm"] > 0 for line in lines if line["mixed_groups"] > 0)
    assert expected <= {name for line in lines for name in line}
    for line in lines:
        assert line.get("logprob_gap_max", 0.0) < 1e-4
    steps = 4 if "train.epochs=2" in overrides else 1 if "kl" in expected else 2
    assert all(line["optimizer_steps"] == steps for line in lines)
    if "kl" in expected:  # the reference is where RL began, and the policy moves away from it
        assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-4) and lines[-1]["kl"] > lines[0]["kl"]


def test_a_saved_run_takes_another_chat_template_but_no_other_tokenizer(run, tmp_path):
    file, question = tmp_path / "mine.jinja", [{"role": "user", "content": "look"}]
    source = json.loads((run / "tokenizer" / "tokenizer_config.json").read_text())["chat_template"]
    file.write_text("<|system|>MINE<|end|>" + source)
    old = open_saved(run, [], warn=print).language.renderer.render(question)
    new = open_saved(run, [f"model.chat_template={file}"], warn=print).language.renderer.render(question)
    assert new == "<|system|>MINE<|end|>" + old
    assert (
        open_saved(run, [f"model = {{chat_template: {file}}}"], warn=print).language.renderer.render(question)
        == new
    )
    with pytest.raises(ConfigError, match="nowhere"):
        open_saved(run, [f"model.chat_template={tmp_path / 'nowhere'}"], warn=print)
    with pytest.raises(ConfigError, match="keeps the tokenizer that it was trained with"):
        open_saved(run, ["model.tokenizer=bytes"], warn=print)


def test_a_stop_on_a_full_disk_is_still_a_stop(tmp_path, monkeypatch):
    def stop(*args, **options):
        raise Interrupted

    def append(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer, "train_in_folder", stop)
    monkeypatch.setattr(events, "append", append)
    with pytest.raises(trainer.Stopped):
        runs.train(tmp_path / "run")


def test_lines_are_written_where_held_out_tasks_are_played_and_at_the_end(tmp_path):
    config = runs.configure(tmp_path, "log.every=10", "eval.every=4", "train.updates=13")
    assert [n for n in range(1, 14) if trainer.is_logged(config, n)] == [4, 8, 10, 12, 13]
    config = runs.configure(tmp_path, "log.every=3", "eval.every=0", "train.updates=8")
    assert [n for n in range(1, 9) if trainer.is_logged(config, n)] == [3, 6, 8]


@pytest.mark.slow
def test_the_schedule_counts_the_steps_that_are_made(tmp_path):
    """Four short episodes fit into one row, and still make two steps an update.

    The decay reaches its end with the last step; a line has the rate of its update's first step.
    """
    options = ["train.schedule=linear", "train.learning_rate=1e-3", "train.final_learning_rate=1e-4"]
    run = runs.train(tmp_path / "run", *runs.HOUSE, "sft.updates=0", *options)
    rates = [line["learning_rate"] for line in read_metrics(run / "metrics.jsonl")]
    assert rates == pytest.approx([1e-3, 7e-4, 4e-4], rel=1e-5)
    assert runs.restored(run).state.step == 3 * 2


@pytest.mark.slow
def test_the_engine_may_run_ahead_of_the_learner(tmp_path):
    options = ["train.max_lag=1", "algorithm.entropy_source=learner", "env.options.latency=0.01"]
    run = runs.train(tmp_path / "run", *runs.HOUSE, *options, "train.updates=4")
    lags = [line["lag"] for line in read_metrics(run / "metrics.jsonl")]
    assert len(lags) == 4 and lags[0] == 0 and 0 < max(lags) <= 1
    assert json.loads((run / "summary.json").read_text())["recompiles_after_warmup"] == 0


@pytest.mark.slow
def test_a_mesh_changes_nothing_but_the_place(tmp_path, monkeypatch):
    """Four devices against one, from the same seed in deterministic mode."""
    opened = []
    real = trainer.open_run

    def open_run(*args, **options):
        opened.append(real(*args, **options))
        return opened[-1]

    monkeypatch.setattr(trainer, "open_run", open_run)
    common = [*runs.HOUSE, "rollout.deterministic=true", "sft.updates=0"]
    one = runs.train(tmp_path / "one", *common)
    four = runs.train(tmp_path / "four", *common, "mesh.data=2", "mesh.fsdp=2")
    for ours, theirs in zip(runs.lines(one), runs.lines(four), strict=True):
        assert ours["tokens_sampled"] == theirs["tokens_sampled"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3, abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    embedding = opened[1][1].state.params["embed"]["embedding"]
    assert len(embedding.sharding.device_set) == 4
    assert embedding.addressable_shards[0].data.size * 2 == embedding.size


def test_a_run_without_matplotlib_ends_with_its_summary(tmp_path, monkeypatch, capfd):
    for name in ("matplotlib", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    run_dir = runs.train(tmp_path / "run", "train.updates=1", "sft.updates=0")
    assert (run_dir / "summary.json").exists() and not (run_dir / "curves.png").exists()
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "curves.png" in line]
    assert line.startswith(f"warning: {run_dir} gets no curves.png: ") and "matplotlib" in line


@pytest.mark.slow
def test_compilation_is_shown_program_by_program(tmp_path, capfd):
    """Each program is announced, and none is left over: the counts end at their totals."""
    runs.train(tmp_path / "run", "log.progress=true", "train.updates=1", "sft.updates=0")
    err = capfd.readouterr().err
    for what in ("learner", "engine"):
        done, total = re.findall(rf"compiling the {what}: (\d+)/(\d+) programs", err)[-1]
        assert done == total and int(total) >= 2
