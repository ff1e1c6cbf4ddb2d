"""Recipes of `tinker-cookbook`, as they are, against our server.

``EMPG_TEST_COOKBOOK`` names the Python of an environment that has the package, textarena and torch.
"""

import json
import os
import subprocess

import jax
import pytest
from serving import serving

from empg_jax.hf.save import save_hf
from empg_jax.models.decoder import DecoderConfig, init_params
from empg_jax.text.builtin import build_byte_tokenizer

PYTHON = os.environ.get("EMPG_TEST_COOKBOOK")
SMALL = ["renderer_name=role_colon", "max_tokens=8", "save_every=0", "max_steps=2"]
# A game against itself, with evaluations against the base model; and a game of one with ten turns.
RECIPES = {
    "text_arena": ["batch_size=2", "num_train_datapoints=4", "num_test_datapoints=2", "eval_every=1"],
    "guess_number": ["batch_size=1", "group_size=4", "eval_every=0"],
}
pytestmark = pytest.mark.long


def find_reason():
    """Why the recipes cannot be run here, or None."""
    if not PYTHON:
        return "EMPG_TEST_COOKBOOK is unset: the Python of an environment with tinker-cookbook and textarena"
    command = [PYTHON, "-c", "import tinker_cookbook, textarena"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return f"{PYTHON} cannot import the packages: {done.stderr.strip()[-200:]}" if done.returncode else None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of a small model of bytes; the recipes load its tokenizer by the model's name, a folder."""
    if reason := find_reason():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cookbook")
    tokenizer = build_byte_tokenizer()
    model = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=32,
        tie_embeddings=False,
    )
    save_hf(init_params(jax.random.key(0), model), model, folder / "model", tokenizer)
    options = [
        *("compile_cache=null", "model.dtype=float32", f"serve.name={folder / 'model'}", "serve.slots=8"),
        *("serve.max_tokens=2048", "serve.warm_up=false", "train.micro_tokens=2048"),
        f"serve.save_dir={folder / 'saved'}",
    ]
    with serving(folder, "serve", folder / "model", "--train", *options) as server:
        yield server


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains(server, tmp_path, recipe):
    log = tmp_path / "log"
    variables = {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-none", "TINKER_TELEMETRY": "0"}
    command = ["-m", f"tinker_cookbook.recipes.multiplayer_rl.{recipe}.train", f"model_name={server.model}"]
    done = subprocess.run(
        [PYTHON, *command, *SMALL, *RECIPES[recipe], f"log_path={log}"],
        cwd=tmp_path,
        env={**os.environ, **variables, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in found if "optim/kl_sample_train_v1" in line]
    assert len(steps) == 2
    # What was sampled and what is trained agree.
    assert all(abs(line[f"optim/kl_sample_train_v{n}"]) < 1e-5 for line in steps for n in (1, 2))
    last = json.loads((log / "checkpoints.jsonl").read_text().splitlines()[-1])
    assert last["name"] == "final" and last["state_path"].startswith("tinker://")
    if recipe == "text_arena":  # whose two players differ in reward
        assert all(line["update_norm"] > 0 for line in steps)
        assert all("test/env/all/reward/total" in line for line in steps)
