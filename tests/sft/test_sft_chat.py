"""The warm start on chat files: the loss that falls is the one that is meant, and a run goes on exactly."""

import dataclasses
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from empg_envs import resolve_spec
from empg_jax import cli, trainer
from empg_jax.learner.batching import merge_turns
from empg_jax.learner.outputs import compute_logprobs
from empg_jax.metrics import MetricsLog
from empg_jax.models.decoder import init_params
from empg_jax.parallel.mesh import make_mesh
from empg_jax.report.progress import Progress
from empg_jax.report.record import RunRecord
from empg_jax.run import assembly
from empg_jax.sft import warm_start as sft
from empg_jax.sft.chat_data import load_chat_data
from empg_jax.sft.demonstrations import record_demonstrations
from empg_jax.sft.examples import gather_examples
from empg_jax.text.chatfile import ChatDataError
from tests import runs
from tests.text.families import build_bpe


def write_chat(path, count, seed=0):
    """Conversations with a rule to learn: whatever is seen is taken."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            messages = []
            for _ in range(
                rng.randint(1, 4)
            ):  # as many turns as the tiny runs' episodes: one compilation for both
                thing = f"{rng.choice(['apple', 'book'])} {rng.randint(1, 3)}"
                messages.append({"role": "user", "content": f"you see {thing}."})
                messages.append({"role": "assistant", "content": f"take {thing}"})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture(scope="module")
def bpe_run(tmp_path_factory):
    """(config, language, model, examples) of a tiny model over a byte-level BPE with a chat template."""
    folder = tmp_path_factory.mktemp("bpe")
    build_bpe("chatml").save(folder / "tokenizer")
    config = runs.configure(
        "unused",
        f"model.tokenizer={folder / 'tokenizer'}",
        f"sft.data={write_chat(folder / 'chat.jsonl', 60)}",
        "sft.updates=12",
        "sft.batch_size=16",
        "sft.learning_rate=1e-2",
        "sft.holdout=0.2",
        "sft.eval_every=5",
        "rollout.max_tokens=128",
        "train.micro_tokens=512",
    )
    language = assembly.make_language(config)
    model = assembly.make_model(config, language.tokenizer)
    return config, language, model, gather_examples(config, language, Progress(enabled=False))


def learn(bpe_run, state, first=0, keep=None):
    """Runs the warm start; returns the last state, the metrics, and a copy of the state after ``keep``."""
    config, _, model, examples = bpe_run
    lines, kept = [], []

    def on_update(update, state, values):
        lines.append(values)
        if update == keep:
            kept.append(jax.tree.map(jnp.copy, state))

    mesh = make_mesh(**vars(config.mesh))
    state = sft.warm_start(config, model, mesh, state, examples, first=first, on_update=on_update)
    return state, lines, kept


def first_state(bpe_run):
    return sft.TrainState(params=init_params(jax.random.key(0), bpe_run[2]), opt_state=None, step=None)


def plain_loss(params, model, examples):
    """Mean cross-entropy over learned tokens, one unpadded example at a time."""
    total = tokens = 0
    for trajectory in examples:
        last = trajectory.turns[-1]
        row = np.concatenate([last.prompt_tokens, last.response_tokens])
        row = np.pad(row, (0, 128 - len(row)))[None]  # one shape, one compilation
        positions = jnp.arange(128)[None]
        logprobs, _ = compiled(params, model, jnp.asarray(row), positions, jnp.ones_like(positions))
        for turn in trajectory.turns:
            start = len(turn.prompt_tokens)
            total -= float(logprobs[0, start : start + len(turn.response_tokens)].sum())
            tokens += len(turn.response_tokens)
    return total / tokens


compiled = jax.jit(compute_logprobs, static_argnums=1)


@pytest.mark.slow
def test_the_loss_falls_and_is_the_cross_entropy_of_the_answers(bpe_run):
    _, _, model, examples = bpe_run
    assert 5 <= len(examples.held_out) <= 20 and len(examples.train) + len(examples.held_out) == 60
    begin = first_state(bpe_run)
    before = plain_loss(begin.params, model, examples.held_out)
    state, lines, kept = learn(bpe_run, begin, keep=6)
    measured = {number: line["sft_eval_loss"] for number, line in enumerate(lines) if "sft_eval_loss" in line}
    assert list(measured) == [4, 9, 11]  # every fifth, and the last
    assert measured[11] == pytest.approx(plain_loss(state.params, model, examples.held_out), abs=2e-5)
    assert lines[-1]["sft_loss"] < 0.5 * lines[0]["sft_loss"]
    assert measured[11] < measured[4] < before

    # From the seventh update on, the same again, bit for bit.
    resumed, again, _ = learn(bpe_run, kept[0], first=7)
    assert again == lines[7:]
    for one, other in zip(jax.tree.leaves(resumed), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def write_expert(path, config, tasks):
    """Episodes of the household's expert as messages, as a person would write them down."""
    spec = resolve_spec(config.env.target)
    env, prompts = spec.make(**config.env.options), spec.prompts(**config.env.prompt_options)
    with path.open("w") as file:
        for task in tasks:
            observation, info = env.reset(seed=config.seed, split="train", index=task)
            messages, is_over, turns = prompts.start(observation, info), False, 0
            while not is_over:
                action = env.expert_action()
                messages.append({"role": "assistant", "content": action})
                observation, _, terminated, truncated, info = env.step(action)
                turns += 1
                is_over = terminated or truncated or turns == config.env.max_turns
                messages.append({"role": "user", "content": prompts.follow(observation, info)})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.mark.parametrize("family", [None, "chatml", "spaced"])
def test_an_experts_episodes_written_down_are_the_episodes_recorded(family, tmp_path):
    overrides = ["sft.noise=0", "env.max_turns=20", "rollout.max_tokens=4096", "train.micro_tokens=4096"]
    if family is not None:
        build_bpe(family).save(tmp_path / "tokenizer")
        overrides.append(f"model.tokenizer={tmp_path / 'tokenizer'}")
    config = runs.configure("unused", *overrides)
    language = assembly.make_language(config)
    recorded = record_demonstrations(config, language, 12)
    path = write_expert(tmp_path / "expert.jsonl", config, [episode.task for episode in recorded])
    written = load_chat_data([path], language.renderer, max_tokens=4096).train
    for one, other in zip(recorded, written, strict=True):
        (row,), (same,) = merge_turns(one, 0), merge_turns(other, 0)
        np.testing.assert_array_equal(row.tokens, same.tokens)
        np.testing.assert_array_equal(row.loss_mask, same.loss_mask)


# --------------------------------------------------------------------------------------------- whole runs


CHAT = ["sft.updates=6", "sft.holdout=0.2", "sft.eval_every=3", "checkpoint.every=2"]


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory):
    return write_chat(tmp_path_factory.mktemp("chat") / "chat.jsonl", 40)


def sft_lines(run):
    return [
        {k: v for k, v in line.items() if k != "time"}
        for line in runs.read_metrics(run / "sft_metrics.jsonl")
    ]


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_died_goes_on_from_its_checkpoint_and_into_rl(chat_file, tmp_path, monkeypatch, capsys):
    whole = trainer.run_sft(runs.configure(tmp_path / "whole", *CHAT, f"sft.data={chat_file}"))
    summary = json.loads((whole / "summary.json").read_text())
    lines = sft_lines(whole)
    assert len(lines) == 6 and [n for n, line in enumerate(lines) if "sft_eval_loss" in line] == [2, 5]
    assert summary["sft_eval_loss"] == lines[5]["sft_eval_loss"] < lines[2]["sft_eval_loss"]
    assert "eval_success_before" in summary and "eval_success_after" not in summary  # nothing came after
    told = capsys.readouterr().err
    assert "chat data: 40 conversations (" in told and "6 updates of 4 are" in told
    assert "warm start update 6: loss" in told and f"held-out {summary['sft_eval_loss']:.4f}" in told

    config = runs.configure(tmp_path / "run", *CHAT, f"sft.data=[{chat_file}]")
    write = MetricsLog.write

    def die(log, step, values):
        if step == 5:
            raise MemoryError("the machine gave up")
        write(log, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", die)
        with pytest.raises(MemoryError):
            trainer.run_sft(config)
    runs.resume(tmp_path / "run", "train.updates=1")
    assert "resumed at update 0" in capsys.readouterr().err
    assert sft_lines(tmp_path / "run") == lines
    assert runs.weights(tmp_path / "run", step=0) == runs.weights(whole)
    assert [line["update"] for line in runs.lines(tmp_path / "run")] == [1]
    assert runs.restored(tmp_path / "run").step == 1


def test_data_that_was_changed_does_not_go_on(bpe_run):
    *_, examples = bpe_run
    record = RunRecord()
    examples.note(record)
    examples.note(record)
    assert record == RunRecord(sft_data=examples.fingerprint) and len(examples.fingerprint) == 16
    with pytest.raises(ChatDataError, match=r"sft\.data was changed since this run began"):
        dataclasses.replace(examples, fingerprint="0123").note(record)


def test_bad_data_is_told_before_anything_is_made(chat_file, tmp_path):
    def fail(*overrides):
        run_dir = tmp_path / "run"
        found = CliRunner().invoke(
            cli.app, ["sft", "quickstart", *runs.TINY, *CHAT, f"run_dir={run_dir}", *overrides]
        )
        assert found.stdout == "" and not run_dir.exists()
        return found.exit_code, found.stderr

    code, err = fail(f"sft.data={tmp_path / 'none.jsonl'}")
    assert code == 2 and f"error: sft.data={tmp_path / 'none.jsonl'}: there is no such file" in err
    bad = tmp_path / "bad.jsonl"
    bad.write_text(chat_file.read_text() + "{}\n")
    code, err = fail(f"sft.data=[{chat_file}, {bad}]")
    assert code == 2 and f"error: sft.data: 1 line is no conversation:\n  {bad}, line 41: has neither" in err
    code, err = fail(f"sft.data={chat_file}", "sft.updates=0")
    assert code == 2 and "has no effect with sft.updates=0" in err
