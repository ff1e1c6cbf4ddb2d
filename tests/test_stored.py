"""Learning from stored episodes: played by one command, trained on by another, without an environment."""

import dataclasses

import numpy as np
import pytest

from empg_jax.cli import app
from empg_jax.errors import ConfigError
from empg_jax.metrics import read_metrics
from empg_jax.run.consumed import read_consumed
from empg_jax.run.storage import load_trajectories, save_trajectories
from tests import runs

SMALL = ["sft.updates=0", "eval.tasks=2", "log.rollouts_every=1"]


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """Episodes of an untrained policy, as the command writes them: 4 groups of 2."""
    out = tmp_path_factory.mktemp("stored") / "episodes.npz"
    config = runs.configure(out.parent / "unused", *runs.HOUSE, *SMALL).to_yaml()
    (out.parent / "config.yaml").write_text(config)
    arguments = ["rollout", str(out.parent / "config.yaml"), "--episodes", "8", "--out", str(out)]
    with pytest.raises(SystemExit) as done:
        app(arguments)
    assert not done.value.code
    return out


def test_the_file_holds_every_token_as_it_was_sampled(played):
    episodes = load_trajectories(played, "rollout.stored")
    assert [(t.group_id, t.member) for t in episodes] == [(n // 2, n % 2) for n in range(8)]
    for episode in episodes:
        for turn in episode.turns:
            assert len(turn.response_tokens) == len(turn.behavior_logprobs) == len(turn.entropies) > 0
            assert len(turn.prompt_tokens) > 0 and (turn.behavior_logprobs < 0).all()


@pytest.mark.slow
def test_a_run_learns_from_stored_episodes_alone(played, tmp_path):
    run = runs.train(tmp_path / "run", *runs.HOUSE, *SMALL, f"rollout.stored={played}", "train.updates=4")
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["tokens_sampled"] for line in lines] == [0.0] * 4
    assert any(line["grad_norm"] > 0 for line in lines)
    consumed = list(read_consumed(run))
    assert [line["group_id"] for line in consumed] == list(range(8))
    # Two passes over the four stored groups, each with every task once.
    tasks = sorted(t.task for t in load_trajectories(played, "") if t.member == 0)
    for begin in (0, 4):
        assert sorted(line["task"] for line in consumed[begin : begin + 4]) == tasks
    # The first update scores what the same weights have sampled: the ratio is 1.
    assert lines[0]["correction_kept"] == 1.0 and lines[0]["ratio"] == pytest.approx(1.0, abs=0.05)
    runs.resume(run, "train.updates=5")
    assert len(list(read_consumed(run))) == 10


def broken(played, tmp_path, change):
    path = tmp_path / "changed.npz"
    save_trajectories(path, [change(episode) for episode in load_trajectories(played, "")])
    return path


def with_token(episode, token):
    first, *others = episode.turns
    tokens = np.concatenate([first.prompt_tokens, np.asarray([token], np.int32)])
    first = dataclasses.replace(first, prompt_tokens=tokens)
    return dataclasses.replace(episode, turns=(first, *others))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, [], r"stored=.*nowhere\.npz cannot be read"),
        (lambda e: dataclasses.replace(e, group_id=e.member), ["rollout.group_size=8"], r"group 0 has 4"),
        (lambda e: with_token(e, 10**6), [], r"token 1000000, but the model knows .* another tokenizer"),
        (lambda e: dataclasses.replace(e, turns=e.turns * 5), [], r"turns, but env\.max_turns=4"),
        (lambda e: with_token(e, 1), ["rollout.max_tokens=8"], r"tokens, but rollout\.max_tokens=8"),
        (lambda e: e, ["train.max_lag=1"], r"max_lag=1 has no effect with rollout\.stored"),
        (lambda e: e, ["algorithm.entropy_source=engine"], r"needs on-policy data, but rollout\.stored="),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_anything_is_written(
    played, tmp_path, change, options, message
):
    path = tmp_path / "nowhere.npz" if change is None else broken(played, tmp_path, change)
    sizes = ["rollout.prefill_buckets=null", "train.micro_tokens=384", "rollout.tasks_per_update=1"]
    with pytest.raises(ConfigError, match=message):
        runs.train(tmp_path / "run", *runs.HOUSE, *SMALL, f"rollout.stored={path}", *sizes, *options)
    assert not (tmp_path / "run").exists()


def test_a_file_of_something_else_is_named(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "numbers.npz", numbers=np.arange(3))
    for name in ("text.npz", "numbers.npz"):
        with pytest.raises(ConfigError, match=rf"stored=.*{name} holds no episodes"):
            runs.train(tmp_path / "run", *runs.HOUSE, f"rollout.stored={tmp_path / name}")
