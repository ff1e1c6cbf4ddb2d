"""The closing table."""

import io

import numpy as np
import pytest
from rich.console import Console

from empg_jax.report.summary import paired_interval, print_summary, wilson_interval

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


def test_tasks_that_were_never_played_do_not_narrow_the_interval():
    text = _text({**SUMMARY, "eval_success_after": 0.5, "eval_missing_after": 156})
    assert "25.0% [20.1, 30.6]" in text and "50.0% [40.4, 59.6]" in text
    assert "50.0%" in _text({**SUMMARY, "eval_success_after": 0.5, "eval_missing_after": 256})


def test_an_interrupted_run_has_only_its_first_half():
    text = _text({"eval_success_before": 0.25, "eval_success_after": None})
    assert "25.0%" in text and "-" in text
    assert _text({})


def test_the_interval_of_the_gain_pairs_tasks():
    """The score test by hand: 12 of 50 tasks gained and 2 lost is 20 points."""
    low, high = paired_interval("0" * 12 + "1" * 38, "1" * 12 + "0" * 2 + "1" * 36)
    assert (low, high) == pytest.approx((0.0611, 0.3447), abs=1e-4)
    low, high = paired_interval("0010", "1011")
    assert low < 0.5 < high
    # What was lost counts as what was gained, with the other sign.
    assert paired_interval("1011", "0010") == pytest.approx((-high, -low))
    with pytest.raises(ValueError, match="3 tasks before and 2 after"):
        paired_interval("011", "01")
    assert "+55.1 points [+49.5, +60.5]" in _text({**SUMMARY, "eval_gain_interval": [0.495, 0.605]})


@pytest.mark.parametrize(("gained", "lost", "total"), [(0.3, 0.05, 16), (0.1, 0.1, 64), (0.6, 0.03, 256)])
def test_the_interval_of_the_gain_holds_it_in_95_of_100_cases(gained, lost, total):
    draws = np.random.default_rng(0).multinomial(total, [gained, lost, 1 - gained - lost], size=1000)
    held = 0
    for up, down, same in draws:
        low, high = paired_interval("0" * up + "1" * down + "1" * same, "1" * up + "0" * down + "1" * same)
        held += low <= gained - lost <= high
    assert 930 <= held <= 985


def test_without_a_change_the_interval_has_width():
    high = 1.959964**2 / (16 + 1.959964**2)
    assert paired_interval("01" * 8, "01" * 8) == pytest.approx((-high, high))


def test_without_a_pair_there_is_no_interval():
    assert paired_interval("0-", "-1") is None
    assert "+55.1 points (n/a)" in _text({**SUMMARY, "eval_gain_interval": None})


def test_no_success_is_not_certain_failure():
    """Wilson for 0 of 16: z² / (16 + z²)."""
    assert wilson_interval(0, 16) == pytest.approx((0.0, 1.959964**2 / (16 + 1.959964**2)))
    assert wilson_interval(16, 16) == pytest.approx((1 - wilson_interval(0, 16)[1], 1.0))
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)  # a table's value
    text = _text({"eval_success_before": 0.0, "eval_success_after": 0.0, "eval_tasks": 16})
    assert "0.0% [0.0, 19.4]" in text
