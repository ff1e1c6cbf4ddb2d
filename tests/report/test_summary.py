"""The closing table."""

import io

import pytest
from rich.console import Console

from empg_jax.report.summary import exact_interval, paired_interval, print_summary, wilson_interval

SUMMARY = {
    "eval_success_before": 0.25,
    "eval_success_after": 205 / 256,
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
    assert "25.0% [20.1, 30.6]" in text and "80.1% [74.8, 84.5]" in text and "+55.1 points" in text
    assert "-2.5" in text
    assert "300 (sft 60, rl 200)" in text and "1,234,567" in text and "won 900, turn_limit 300" in text


def test_an_interrupted_run_has_only_its_first_half():
    text = _text({"eval_success_before": 0.25, "eval_success_after": None})
    assert "25.0%" in text and "-" in text
    assert _text({})


def test_the_interval_of_the_gain_pairs_tasks():
    """Two of four tasks changed, both for the better: the rate of that lies in [0.025 ** (1 / 2), 1]."""
    low, high = paired_interval("0010", "1011")
    assert (low, high) == pytest.approx(((2 * 0.025**0.5 - 1) / 2, 0.5))
    # What was lost counts as what was gained, with the other sign.
    assert paired_interval("1011", "0010") == pytest.approx((-high, -low))
    with pytest.raises(ValueError, match="3 tasks before and 2 after"):
        paired_interval("011", "01")
    assert "+55.1 points [+49.5, +60.5]" in _text({**SUMMARY, "eval_gain_interval": [0.495, 0.605]})


def test_where_no_result_changed_there_is_no_interval():
    assert paired_interval("0110", "0110") is None
    assert "+55.1 points (n/a)" in _text({**SUMMARY, "eval_gain_interval": None})


def test_no_success_is_not_certain_failure():
    """Wilson for 0 of 16: z² / (16 + z²)."""
    assert wilson_interval(0, 16) == pytest.approx((0.0, 1.959964**2 / (16 + 1.959964**2)))
    assert wilson_interval(16, 16) == pytest.approx((1 - wilson_interval(0, 16)[1], 1.0))
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)  # a table's value
    text = _text({"eval_success_before": 0.0, "eval_success_after": 0.0, "eval_tasks": 16})
    assert "0.0% [0.0, 19.4]" in text


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [
        (0, 10, (0.0, 0.3085)),
        (3, 10, (0.0667, 0.6525)),
        (10, 10, (0.6915, 1.0)),
        (400, 512, (0.7429, 0.8164)),
    ],
)
def test_the_exact_interval(count, total, expected):
    """Values of scipy.stats.binomtest(...).proportion_ci(method="exact")."""
    assert exact_interval(count, total) == pytest.approx(expected, abs=1e-4)
