"""Self-play by the commands: the server that samples the policy's seat plays the other one, too."""

import gzip
import json

import httpx
import pytest
from serving import serving
from typer.testing import CliRunner

from empg_jax.cli import app
from empg_jax.metrics import read_metrics
from tests import runs
from tests.adapters.needs import need

need("textarena")

KEY = "secret"
GAME = [
    *("env.name=null", "env.entry_point=wire_envs:TEXTARENA", "rollout.max_response_tokens=1"),
    *("rollout.max_tokens=256", "rollout.prefill_buckets=[64]", "train.micro_tokens=1024"),
]


@pytest.mark.slow
def test_the_opponent_is_the_policy_in_training(tmp_path, monkeypatch):
    monkeypatch.setenv("EMPG_API_KEY", KEY)
    tiny = [option for option in runs.TINY if not option.startswith(("sft", "eval", "log", "checkpoint"))]
    model = [option for option in tiny if option.startswith(("model", "compile"))]
    serve = [
        "--api-key",
        KEY,
        *model,
        *GAME[:2],
        "serve.warm_up=false",
        "serve.slots=4",
        "serve.max_tokens=256",
    ]
    with serving(tmp_path, "serve", "quickstart", *serve) as server:
        game = {"id": "IteratedRockPaperScissors-v0", "kwargs": {"num_rounds": 1}, "opponent": server.url}
        game["opponent_options"] = {"max_tokens": 1}
        options = [
            *("sft.updates=0", "train.updates=2", "train.learning_rate=0.01", "eval.tasks=2"),
            *("log.rollouts_every=1", "workers.pass_env=[EMPG_API_KEY]", "workers.step_timeout=60"),
            *("rollout.engine=openai", f"rollout.url={server.url}", f"env.options={json.dumps(game)}"),
        ]
        run = tmp_path / "run"
        done = CliRunner().invoke(app, runs.command(run, *GAME, *options))
        assert done.exit_code == 0, done.output
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=server.url, headers=headers, trust_env=False, timeout=60) as http:
            body = {"prompt": [1], "max_tokens": 1, "return_token_ids": True}
            choice = http.post("/v1/completions", json=body).json()["choices"][0]
        assert choice["empg"]["versions"] == [2]  # the opponent's weights have followed
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["episodes_trained"] for line in lines] == [4, 4]
    assert all(line["logprob_gap_max"] < 1e-4 for line in lines)
    files = sorted((run / "rollouts").glob("update-*.jsonl.gz"))
    episodes = [
        json.loads(line) for file in files for line in gzip.decompress(file.read_bytes()).splitlines()
    ]
    assert {episode["return"] for episode in episodes} <= {-1.0, 0.0, 1.0}
    # Only the policy's own seat is in the rows: one token in each of its turns.
    sampled = sum(line["tokens_sampled"] for line in lines)
    assert sampled == sum(len(episode["turns"]) for episode in episodes)
