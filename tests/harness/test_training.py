"""Programs as agents, trained by the command: turns as they were sampled, rows by prefix proof."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from empg_jax.learner.batching import merge_turns
from empg_jax.metrics import read_metrics
from empg_jax.run.play import play_new
from empg_jax.run.storage import load_trajectories
from tests import runs
from tests.harness import agents
from tests.serve.servers import ROOT

SMALL = [
    *(line for line in runs.TINY if not line.startswith(("sft.updates", "rollout.max", "train.micro"))),
    "sft.updates=0",
    "rollout.max_tokens=256",
    "rollout.max_response_tokens=6",
    "rollout.prefill_buckets=[32]",
    "train.micro_tokens=512",
    "workers.reset_timeout=120",
    "workers.step_timeout=120",
    "env.options.start_timeout=100",
    "env.options.call_timeout=100",
]


def configure(folder, kind, *more):
    command = f"env.options.command=python {agents.__file__} {kind}"
    return runs.load_config("quickstart", [*SMALL, "env.name=harness", command, f"run_dir={folder}", *more])


def play(tmp_path, kind, *more):
    """The episodes of one group of programs."""
    out = tmp_path / "episodes.npz"
    config = configure(tmp_path / "run", kind, "model.tokenizer=bytes", *more)
    play_new(config, 2, out, print)
    return load_trajectories(out, "episodes")


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("grow", [[0, 1, 2]]),  # one conversation, one row
        ("rewrite", [[0, 1], [2], [3]]),  # another history, and back to the first
        ("parallel", [[0], [1], [2]]),
    ],
)
def test_each_conversation_is_a_row(kind, rows, tmp_path):
    for trajectory in play(tmp_path, kind):
        assert trajectory.outcome.reason == "won" and trajectory.episode_return == 1.0
        segments = merge_turns(trajectory, 0)
        found = [sorted({int(turn) for turn in s.turn_ids[s.loss_mask]}) for s in segments]
        assert found == rows
        if kind == "rewrite":  # the first conversation goes on with the exact tokens
            last, second = trajectory.turns[3], trajectory.turns[1]
            so_far = [*second.prompt_tokens, *second.response_tokens]
            assert last.prompt_tokens[: len(so_far)].tolist() == so_far


def test_a_program_that_calls_on_and_on_is_truncated(tmp_path):
    for trajectory in play(tmp_path, "endless"):
        assert (trajectory.outcome.reason, trajectory.truncated) == ("turn_limit", True)
        assert len(trajectory.turns) == 4 and trajectory.episode_return == 0.0


def test_a_window_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"env\.context=window: the prompts of harness are its program's"):
        play(tmp_path, "grow", "env.context=window")


def train(folder, options, *more):
    """Train by the command line, as a person does, from the folder of the example."""
    code = "from empg_jax.cli import main; main()"
    command = [
        sys.executable,
        "-P",
        "-c",
        code,
        "train",
        *options,
        *SMALL,
        f"run_dir={folder / 'run'}",
        *more,
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("chat_agent", ["algorithm.name=grpo_empg"]),
        pytest.param(
            "tool_agent",
            ["algorithm.name=grpo_aem", "rollout.max_tokens=1024", "train.micro_tokens=2048"],
            marks=pytest.mark.long,
        ),
    ],
)
def test_an_example_trains_for_two_updates(name, more, tmp_path):
    example = ROOT / "scripts" / "examples" / f"{name}.py"
    shutil.copy(example, tmp_path)
    shutil.copy(ROOT / "scripts" / "examples" / "tools.jinja", tmp_path)
    (told,) = re.findall(r"^empg-jax train (.*(?:\nmodel\..*)?)$", example.read_text(), re.M)
    done = train(tmp_path, shlex.split(told), *more, "train.updates=2", "eval.tasks=2")
    assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["update"] for line in lines][-2:] == [1, 2]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary
    events = tmp_path / "run" / "events.jsonl"
    assert not events.exists() or "agent_" not in events.read_text()


@pytest.mark.slow
def test_a_program_that_crashes_stops_the_run_with_its_words(tmp_path):
    shutil.copy(agents.__file__, tmp_path)
    command = f"env.options.command=python {tmp_path / 'agents.py'} crash"
    done = train(
        tmp_path, ["quickstart", "env.name=harness", command, "faults.patience=2", "faults.probe=0.5"]
    )
    assert done.returncode == 1
    assert "agent_crashed" in done.stderr and "out of luck" in done.stderr
