"""A run whose engine keeps keys and values in pages is the same run."""

import json

import pytest

from empg_jax.metrics import read_metrics
from tests import runs

SAME = [*runs.HOUSE, "rollout.deterministic=true", "rollout.group_size=4", "train.updates=2", "sft.updates=0"]
# Rows of 8 slots take 768 tokens. Here is room for one conversation of the longest, and the others give way.
PAGES = ["rollout.page_tokens=16", "rollout.kv_tokens=96"]
# Responses that are held back take more steps, and what gave way is prefilled again.
DIFFERENT = {"tokens_evicted", "tokens_prefilled", "tokens_shared", "prefix_hits", "slot_occupancy"}


@pytest.mark.slow
def test_pages_change_the_memory_and_nothing_else(tmp_path):
    rows = runs.train(tmp_path / "rows", *SAME)
    pages = runs.train(tmp_path / "pages", *SAME, *PAGES)
    for ours, theirs in zip(runs.lines(pages), runs.lines(rows), strict=True):
        assert ours.keys() - theirs.keys() == {"page_use"} and 0 < ours["page_use"] <= 1
        for name in theirs.keys() - DIFFERENT:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    assert all(line["tokens_evicted"] > 0 and line["page_use"] == 1 for line in runs.lines(pages))
    assert json.loads((pages / "summary.json").read_text())["recompiles_after_warmup"] == 0
    assert all(line["recompiles"] == 0 for line in read_metrics(pages / "metrics.jsonl"))
