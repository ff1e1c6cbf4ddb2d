"""The policy that a folder gives: its name, sizes and warnings."""

import json
import shutil

import pytest

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
