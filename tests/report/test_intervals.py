"""pass@k, mean@k and their intervals: values by hand, coverage, and width where nothing varies."""

import itertools

import numpy as np
import pytest

from empg_jax.report import intervals
from empg_jax.report.intervals import estimate, pass_at_k, sizes_up_to


@pytest.mark.parametrize(("attempts", "successes"), [(5, 0), (5, 2), (4, 4), (3, 1)])
def test_pass_at_k_is_the_share_of_choices_with_a_success(attempts, successes):
    results = [1] * successes + [0] * (attempts - successes)
    for k in range(1, attempts + 1):
        choices = [max(chosen) for chosen in itertools.combinations(results, k)]
        assert pass_at_k(attempts, successes, k) == pytest.approx(np.mean(choices))


def test_pass_at_k_needs_k_attempts():
    with pytest.raises(ValueError, match="pass@4 needs 4 attempts, not 3"):
        pass_at_k(3, 1, 4)


def test_pass_at_k_is_unbiased():
    rng = np.random.default_rng(0)
    found = [pass_at_k(4, int(count), 2) for count in rng.binomial(4, 0.3, size=20_000)]
    assert np.mean(found) == pytest.approx(1 - 0.7**2, abs=0.01)


def test_one_attempt_each_has_wilsons_interval():
    found = estimate([1, 0, 0, 1, 1, 0, 0, 0, 0, 0])
    assert (found["value"], found["method"], found["tasks"]) == (0.3, "wilson", 10)
    assert found["interval"] == pytest.approx([0.1078, 0.6032], abs=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
def test_an_interval_always_has_width(value):
    for tasks in (1, 16):
        low, high = estimate([value] * tasks)["interval"]
        assert low <= value <= high and high - low > 0.15
    assert estimate([0.0] * 16)["interval"][1] == pytest.approx(0.1936, abs=1e-4)


def test_shares_are_resampled_task_by_task():
    values = [0.25, 0.5, 0.75, 0.0] * 10
    found = estimate(values)
    half = 1.96 * np.std(values) / np.sqrt(len(values))
    assert found["method"] == "bootstrap" and found == estimate(values)
    assert found["interval"] == pytest.approx([0.375 - half, 0.375 + half], abs=0.01)


def test_an_interval_of_few_tasks_is_as_wide_as_students():
    """Plain percentiles of eight shares lie about a fifth closer together."""
    values = [0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0]
    found = estimate(values)
    low, high = found["interval"]
    assert found["method"] == "bootstrap"
    assert high - low == pytest.approx(2 * 2.365 * np.std(values, ddof=1) / 8**0.5, rel=0.1)


def test_a_single_success_has_wilsons_interval():
    """One of four attempts at one of 64 tasks; resampled, the interval ended at 1.2 %."""
    found = estimate([0.25] + [0.0] * 63)
    assert found["method"] == "wilson" and found["interval"][1] > 0.05
    assert estimate([0.25] * 5 + [0.0] * 59)["method"] == "wilson"
    assert estimate([0.25] * 6 + [0.0] * 58)["method"] == "bootstrap"


@pytest.mark.parametrize("share", [0.01, 0.02, 0.05])
def test_intervals_cover_what_they_say_where_successes_are_rare(share, monkeypatch):
    """Four attempts at each of 64 tasks, of which most are hardly ever solved."""
    monkeypatch.setattr(intervals, "RESAMPLES", 200)
    rng, kept = np.random.default_rng(0), 0
    for _ in range(200):
        chances = np.minimum(1, share * rng.exponential(size=64))
        low, high = estimate(list(rng.binomial(4, chances) / 4))["interval"]
        kept += low <= share <= high
    assert kept / 200 > 0.92


def test_there_is_no_estimate_of_nothing():
    with pytest.raises(ValueError, match="at least one task"):
        estimate([])


def test_k_in_powers_of_two():
    assert [sizes_up_to(n) for n in (1, 2, 3, 8, 10)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4, 8],
        [1, 2, 4, 8, 10],
    ]
