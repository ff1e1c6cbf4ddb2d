"""Runs with and without ``train.share_prefix`` are the same run, with fewer tokens in the learner's rows."""

import json

import pytest

from empg_jax.metrics import read_metrics
from tests import runs

SAME = [
    *runs.HOUSE,
    *("rollout.deterministic=true", "rollout.group_size=4", "env.context=window", "env.history=1"),
    # Both epochs read scores of the learner, the second one in rows that it packs anew.
    *("algorithm.entropy_source=learner", "train.epochs=2", "train.updates=2", "sft.updates=0"),
]
DIFFERENT = {"packing_efficiency", "train_tokens_shared"}


@pytest.mark.slow
def test_sharing_changes_the_rows_and_nothing_else(tmp_path):
    alone, shared = (
        runs.train(tmp_path / str(value), *SAME, f"train.share_prefix={value}") for value in ("false", "true")
    )
    for ours, theirs in zip(runs.lines(shared), runs.lines(alone), strict=True):
        assert ours.keys() == theirs.keys()
        assert theirs["train_tokens_shared"] == 0 < ours["train_tokens_shared"]
        assert 0 < ours["packing_efficiency"] <= 1
        for name in ours.keys() - DIFFERENT:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    assert any(line["grad_norm"] > 1e-3 for line in runs.lines(shared))
    assert json.loads((shared / "summary.json").read_text())["recompiles_after_warmup"] == 0
    # The rows' room is fixed before the first episode; the sampler agrees with what was computed in them.
    assert all(line["recompiles"] == 0 for line in read_metrics(shared / "metrics.jsonl"))
    assert all(line["logprob_gap_max"] < 1e-4 for line in read_metrics(shared / "metrics.jsonl"))
