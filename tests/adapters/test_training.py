"""The configurations of adapters, made tiny, with the real packages in workers without JAX."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest

from empg_jax.config import load_config
from empg_jax.config.yaml import find_packaged
from empg_jax.metrics import read_metrics
from empg_jax.rollout.episode import Attempt
from empg_jax.run import assembly, sampling
from empg_jax.trainer import train
from tests import runs
from tests.adapters.needs import need
from tests.rollout.scripted import Speaker, run

need("gymnasium", "reasoning_gym", "textarena")
pytestmark = pytest.mark.slow

BYTES = ["model.path=null", "model.tokenizer=bytes"]
CONFIGS = [name for name in find_packaged() if name.startswith(("gymnasium", "reasoning_gym", "textarena"))]
# What the policy always says, and how an episode of task 0 of the configuration ends then.
SAID = {
    "gymnasium_frozenlake": ("I go <action>Down</action>", "ended", 0.0, "Walk from S to G"),
    "textarena_tictactoe": ("<action>[4]</action>", "invalid_move", -1.0, "You are Player 0 in Tic Tac Toe"),
    "reasoning_gym_tiny": ("", "ended", 0.0, "Spell this word backward"),
    "reasoning_gym_curriculum": (
        "<answer>?</answer>",
        "ended",
        0.0,
        "Think step by step, then give the final",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_episode_of_each_configuration(name):
    said, reason, paid, prompt = SAID[name]
    config = load_config(
        name, [*BYTES, "workers.num=1", "workers.reset_timeout=120", "workers.step_timeout=120"]
    )
    language = assembly.make_language(config)
    with sampling.make_pool(config) as pool:
        engine = Speaker(language.tokenizer.encode(said or "?"))
        collector = sampling.make_collector(config, engine, pool, language, stream=0)
        (trajectory,) = run(collector, [Attempt("train", 0, 0, 0)]).values()
    assert trajectory.outcome.reason == reason
    assert trajectory.episode_return == pytest.approx(paid, abs=0.06)  # a wrong answer may earn a little
    assert all(turn.is_valid for turn in trajectory.turns)
    assert prompt in language.tokenizer.decode(engine.prompts[0])


def test_a_worker_loads_no_jax():
    env = load_config("textarena_tictactoe").env
    commands = [{"id": 0, "env": 0, "op": "reset", "args": {"seed": 0, "split": "train", "index": 0}}]
    commands += [{"id": 1, "op": "modules"}]
    said = (
        "\n".join(json.dumps(line) for line in ({"env": env.name, "options": env.options}, commands)) + "\n"
    )
    worker = [sys.executable, "-m", "empg_envs.worker"]
    done = subprocess.run(worker, input=said, capture_output=True, text=True, timeout=300)
    *_, reset, modules = map(json.loads, done.stdout.splitlines())
    assert reset["ok"] and "textarena" in modules["modules"]
    assert not {"jax", "flax", "empg_jax", "torch"} & set(modules["modules"])


def test_the_small_configuration_trains(tmp_path):
    small = [line for line in runs.TINY if not line.startswith(("rollout.max_r", "train.updates"))]
    more = ["train.updates=1", "sft.updates=0", "log.rollouts_every=1", "eval.tasks=2"]
    more += ["rollout.max_response_tokens=6"]
    more += ["rollout.prefill_buckets=[80]", "workers.step_timeout=120", "workers.reset_timeout=120"]
    config = load_config("reasoning_gym_tiny", [*small, *more, f"run_dir={tmp_path / 'run'}"])
    folder = train(config)
    last = read_metrics(folder / "metrics.jsonl")[-1]
    assert last["update"] == 1 and {"env_score", "env_scorer_error"} <= last.keys()
    with gzip.open(next((folder / "rollouts").iterdir()), "rt") as file:
        episodes = [json.loads(line) for line in file]
    assert len(episodes) == 4 and all(len(episode["turns"]) == 1 for episode in episodes)
    assert np.isfinite([episode["return"] for episode in episodes]).all()
