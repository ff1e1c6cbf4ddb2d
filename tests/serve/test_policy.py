"""The policy that a folder gives: its name, sizes and warnings."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from empg_jax.cli import app
from empg_jax.run.announcing import announce_length
from empg_jax.serve.policy import open_policy

OPTIONS = ["compile_cache=null", "serve.slots=1"]


@pytest.mark.parametrize(
    ("positions", "options", "longest"),
    [(64, [], 64), (64, ["serve.max_tokens=128"], 128), (None, [], 4096), (10**6, [], 4096)],
)
def test_conversations_are_as_long_as_the_model_was_made_for(positions, options, longest, talker, tmp_path):
    folder, told = tmp_path / "model", []
    shutil.copytree(talker, folder)
    keys = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": positions}
    (folder / "config.json").write_text(json.dumps(keys))
    policy = open_policy(str(folder), [*OPTIONS, *options], told.append)
    assert policy.engine.config.max_tokens == longest
    warnings = [line for line in told if "made for 64 tokens" in line]
    assert [line[:20] for line in warnings] == ["serve.max_tokens=128"] * bool(options)
    # A run says it of its rows.
    announce_length(policy.config, 65, say=told.append)
    assert any(line.startswith("rollout.max_tokens=65, but") for line in told) == (positions == 64)


def widen(folder):
    keys = json.loads((folder / "config.json").read_text()) | {"hidden_size": 32}
    (folder / "config.json").write_text(json.dumps(keys))


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("command", "damage", "says"),
    [
        ("serve", widen, "misshaped: model.embed_tokens.weight is "),
        ("serve", lambda folder: (folder / "model.safetensors").unlink(), "holds neither model.safetensors"),
        ("chat", cut, "model.safetensors"),
    ],
)
def test_a_damaged_model_is_refused_as_training_refuses_it(command, damage, says, talker, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(talker, folder)
    damage(folder)
    done = CliRunner().invoke(app, [command, str(folder), *OPTIONS])
    assert isinstance(done.exception, SystemExit) and done.exit_code == 2, done.exception
    assert f"\nerror: model.path={folder}: " in "\n" + done.stderr and says in done.stderr
