"""The record of a run: what it counts, what it keeps in a checkpoint, what it tells."""

import json

from empg_jax.report.record import PanelResult, RunRecord
from tests.episodes import Episodes


def test_a_record_survives_a_checkpoint():
    record = RunRecord(phase="rl", sft_update=3, sft_data="ab", sft_eval_loss=0.5, weights_before="cd")
    record.panels["before"] = PanelResult(0, {"eval_success": 0.5}, "10")
    record.count([Episodes().transcript([(2, 3), (1, 4)])], {"trained:won": 1, "discarded:timeout": 2})
    assert RunRecord.from_json(json.loads(json.dumps(record.as_json()))) == record


def test_the_summary_tells_totals_and_panels_and_hides_the_bookkeeping():
    record = RunRecord(rollbacks_in_a_row=2)
    assert record.summary() == {"tokens_sampled": 0, "trajectories": {}}
    for update, when in ((0, "before"), (5, "after")):
        record.panels[when] = PanelResult(update, {"eval_success": 0.1 * update}, "01")
        record.count([Episodes().transcript([(2, 3)])], {"trained:won": update, "discarded:timeout": 1})
    record.recompiles_after_warmup, record.weights_before = 0, "cd"
    assert record.summary() == {
        "weights_before": "cd",
        "eval_success_before": 0.0,
        "eval_success_after": 0.5,
        "eval_wins_before": "01",
        "eval_wins_after": "01",
        "eval_tasks": 2,
        "updates": 5,
        "tokens_sampled": 6,
        "trajectories": {"discarded:timeout": 1, "trained:won": 5},
        "recompiles_after_warmup": 0,
    }
