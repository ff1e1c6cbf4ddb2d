"""The closing table."""

import io

from rich.console import Console

from empg_jax.report.summary import half_width, print_summary

SUMMARY = {
    "eval_success_before": 0.25,
    "eval_success_after": 0.8,
    "eval_turns_before": 9.0,
    "eval_turns_after": 6.5,
    "eval_tasks": 256,
    "updates": 150,
    "wall_seconds": {"total": 300.4, "sft": 60.0, "rl": 200.0},
    "recompiles_after_warmup": 0,
    "tokens_sampled": 1_234_567,
    "trajectories": {"won": 900, "turn_limit": 300},
}


def _text(summary):
    out = io.StringIO()
    print_summary(summary, Console(file=out, width=120))
    return out.getvalue()


def test_before_after_and_costs():
    text = _text(SUMMARY)
    assert "256 tasks" in text
    assert "25.0% ± 5.3%" in text and "80.0% ± 4.9%" in text and "+55.0 points" in text
    assert "-2.5" in text
    assert "300 (sft 60, rl 200)" in text and "1,234,567" in text and "won 900, turn_limit 300" in text


def test_an_interrupted_run_has_only_its_first_half():
    text = _text({"eval_success_before": 0.25, "eval_success_after": None})
    assert "25.0%" in text and "-" in text
    assert _text({})


def test_half_width_is_the_normal_interval():
    assert half_width(0.5, 100) == 1.96 * 0.05
