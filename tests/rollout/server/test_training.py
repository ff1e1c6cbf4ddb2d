"""Training on the samples of our own server in a process of its own, by the commands, over loopback HTTP."""

import asyncio
import gzip
import json

import httpx
import pytest
from serving import serving
from typer.testing import CliRunner

from empg_jax.cli import app
from empg_jax.metrics import read_metrics
from empg_jax.serve.reload import make_reload
from empg_jax.serve.wire import ApiError
from tests import runs

KEY = "secret"
# Both runs learn from the learner's scores, as a run with a server always does.
SAME = [
    *("seed=3", "sft.updates=0", "train.updates=2", "eval.tasks=4", "eval.every=1", "log.rollouts_every=1"),
    *("log.rollouts_tokens=true", "algorithm.entropy_source=learner", "algorithm.correction.kind=tis"),
    "env.max_turns=3",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    options = [o for o in runs.TINY if not o.startswith(("sft", "eval", "log", "checkpoint", "workers"))]
    more = ["seed=3", "serve.warm_up=false", "serve.slots=4"]
    with serving(folder, "serve", "quickstart", "--api-key", KEY, *options, *more) as server:
        yield server


def train(run_dir, *overrides):
    """Train by the command; return its output."""
    done = CliRunner().invoke(app, [*runs.command(run_dir, *SAME), *overrides])
    assert done.exit_code == 0, done.output
    return done.output


def episodes(run_dir):
    files = sorted((run_dir / "rollouts").glob("update-*.jsonl.gz"))
    return [json.loads(line) for file in files for line in gzip.open(file, "rt")]


def tokens(run_dir):
    """Sampled tokens and versions of every turn, by update, group and member."""
    return {
        (e["update"], e["group_id"], e["member"]): [(t["token_ids"], t["version"]) for t in e["turns"]]
        for e in episodes(run_dir)
    }


@pytest.mark.slow
def test_the_same_tokens_as_the_engine_in_the_program(server, tmp_path, monkeypatch):
    monkeypatch.setenv("EMPG_API_KEY", KEY)
    train(tmp_path / "own")
    train(tmp_path / "http", "rollout.engine=openai", f"rollout.url={server.url}/v1")
    own, found = tokens(tmp_path / "own"), tokens(tmp_path / "http")
    assert len(found) == 8 and found == own
    assert {version for turns in found.values() for _, version in turns} == {0, 1}
    lines, others = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("http", "own"))
    assert [line["update"] for line in lines] == [1, 2]
    for line, other in zip(lines, others, strict=True):
        assert line["logprob_gap_max"] < 1e-4
        for name in ("entropy", "episode_return", "grad_norm", "tokens_sampled", "lag"):
            assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6)
        assert "slot_occupancy" not in line and 0 < line["prefix_hits"] < 1
    # Held-out episodes are sampled there, too, each time with the weights of that moment.
    results = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("http", "own")]
    for name in ("eval_wins_before", "eval_wins_after"):
        assert results[0][name] == results[1][name]
    # The server's weights have followed.
    with httpx.Client(
        base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, trust_env=False
    ) as http:
        body = {"prompt": [1], "max_tokens": 1, "return_token_ids": True}
        choice = http.post("/v1/completions", json=body, timeout=60).json()["choices"][0]
    assert choice["empg"]["versions"] == [2]


def refuse(command, *overrides):
    """Call a command that must fail; return its exit code and message."""
    done = CliRunner().invoke(app, [*command, *SAME, *overrides])
    assert not isinstance(done.exception, AssertionError), done.exception
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.slow
def test_a_server_that_cannot_sample_for_the_run_is_told_at_the_start(server, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    asked = [*runs.command(run_dir), "rollout.engine=openai"]
    code, message = refuse(asked, "rollout.url=http://127.0.0.1:9")
    assert code == 2 and "rollout.url=http://127.0.0.1:9 does not answer" in message
    code, message = refuse(asked, f"rollout.url={server.url}")
    assert code == 2 and "status 401" in message and "EMPG_API_KEY" in message
    monkeypatch.setenv("EMPG_API_KEY", KEY)
    longer = ("rollout.max_tokens=128", "train.micro_tokens=512", f"rollout.url={server.url}")
    code, message = refuse(asked, *longer)
    assert code == 2 and "conversations of at most 96 tokens, but rollout.max_tokens=128" in message
    assert not run_dir.exists()  # nothing was written


@pytest.mark.slow
def test_a_server_of_another_model_refuses_the_weights(server, tmp_path, monkeypatch):
    monkeypatch.setenv("EMPG_API_KEY", KEY)
    asked = [
        "rollout",
        "quickstart",
        "--episodes",
        "2",
        "--out",
        str(tmp_path / "episodes.jsonl"),
        *runs.TINY,
    ]
    code, message = refuse(
        asked, "model.hidden_size=16", "rollout.engine=openai", f"rollout.url={server.url}"
    )
    assert code == 1 and "refuses POST /update_weights_from_disk: status 400" in message
    assert "describes another model: head_dim is 8, here 16" in message


@pytest.mark.slow
def test_only_what_fits_is_loaded(server, tmp_path):
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as http:

        def post(body, path="/update_weights_from_disk", headers=headers):
            answer = http.post(path, json=body, headers=headers)
            return answer.status_code, answer.json()["error"]["message"]

        assert post({"model_path": str(tmp_path)}, headers={})[0] == 401
        status, message = post({"model_path": "owner/name"})
        assert status == 400 and "must be a folder that this server sees" in message
        status, message = post({"model_path": str(tmp_path)})
        assert status == 400 and f"model_path={tmp_path}" in message
        status, message = post({"model_path": str(tmp_path), "weight_version": "new"})
        assert status == 400 and "weight_version='new' must be a number" in message
        assert post({"folder": str(tmp_path)})[0] == 400
        for ids in ([1, 2, 3], [1, 2, 3, -4], "1234"):
            status, message = post({"prompt": [1], "empg": {"ids": ids}}, "/v1/completions")
            assert status == 400 and "empg.ids must be four integers" in message
        status, message = post({"prompt": [1], "n": 2, "empg": {"ids": [0, 0, 0, 0]}}, "/v1/completions")
        assert status == 400 and "one prompt, with n=1" in message


def test_without_a_token_nobody_loads_weights():
    route = make_reload(None, None, has_key=False)
    with pytest.raises(ApiError, match="start with --api-key") as refused:
        asyncio.run(route.handler(None, {"model_path": "/"}))
    assert refused.value.status == 403
