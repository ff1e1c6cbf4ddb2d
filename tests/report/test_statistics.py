"""The numbers of a study against values worked out by hand."""

import itertools
import math

import numpy as np
import pytest

from empg_jax.report.statistics import (
    area,
    band,
    bootstrap,
    compare,
    correlation,
    detectable,
    holm,
    interquartile_mean,
    sign_flip,
    updates_to,
)


def test_the_area_is_the_mean_height_over_updates():
    assert area([(0, 0.0), (10, 1.0), (20, 1.0)]) == 0.75
    assert area([(0, 0.0), (10, 1.0), (40, 1.0)]) == 0.875  # the last piece is longer
    assert area([(0, 0.3)]) == 0.3
    assert area([(2, 0.2), (2, 0.4)]) == pytest.approx(0.3)  # a log may say an update twice


def test_the_updates_to_a_level_lie_between_points():
    curve = [(0, 0.2), (10, 0.4), (20, 0.8), (30, 0.5)]
    assert updates_to(curve, 0.6) == pytest.approx(15)
    assert updates_to(curve, 0.1) == 0 and updates_to(curve, 0.4) == 10
    assert updates_to(curve, 0.9) is None


def test_the_interquartile_mean_leaves_a_quarter_out_at_each_end():
    assert interquartile_mean(np.array([100, 0, 5, 1, 4, 2, 3, -9])) == (1 + 2 + 3 + 4) / 4
    assert interquartile_mean(np.array([1.0, 2.0, 6.0])) == 3  # too few to leave any out


@pytest.mark.parametrize(
    ("values", "p"),
    [
        ([1.0], 1),
        ([1.0, -1.0], 1),
        ([3.0, 1.0], 2 / 4),
        ([1.0, 2.0, 3.0], 2 / 8),
        ([-1.0, 2.0, 3.0], 4 / 8),  # 6 and 4 of the sums 6, 4, 2, 0, and their negatives
        ([0.0, 0.0], 1),
        ([0.1] * 16, 2 / 2**16),
    ],
)
def test_few_pairs_are_tested_exactly(values, p):
    assert sign_flip([np.array(values)]) == p


def test_many_pairs_are_tested_by_samples():
    assert sign_flip([np.array([1.0] * 9 + [-1.0] * 8)]) == 1  # every sum of 17 signs is at least 1
    rates = np.random.default_rng(3).uniform(1.0, 2.0, size=(20, 8))
    for scale in (1.0, 1e5, 1e-5):  # tokens per second, too
        assert {sign_flip([scale * values]) for values in rates} == {2 / 2**8}
    assert sign_flip([np.ones(40)]) == 1 / 100_001  # the observed signs alone
    # Of 17 equal values: a sum of 7 or more, so 12 or more of one sign.
    exact = 2 * sum(math.comb(17, k) for k in range(12, 18)) / 2**17
    assert sign_flip([np.array([1.0] * 12 + [-1.0] * 5)]) == pytest.approx(exact, abs=0.005)


def test_pairs_of_a_task_with_few_weigh_more():
    tasks = [np.array([1.0, 3.0]), np.array([-5.0])]
    terms = [1 / 4, 3 / 4, -5 / 2]
    sums = [abs(np.dot(signs, terms)) for signs in itertools.product([1, -1], repeat=3)]
    assert sign_flip(tasks) == np.mean(np.array(sums) >= 1.5 - 1e-9)


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    corrected = holm([math.nan, 0.02, 0.03])
    # What has no data yet is one of the family of three.
    assert math.isnan(corrected[0]) and corrected[1:] == pytest.approx([0.06, 0.06])
    assert holm([]) == []


def test_the_detectable_difference_of_the_plan():
    """16 pairs with an sd of 5 points find 3.5, were the sd known; with the 15 degrees it has, 3.7."""
    assert detectable(5 / 4, 10**6) == pytest.approx(3.50, abs=0.01)
    assert detectable(5 / 4, 15) == pytest.approx((2.131 + 0.866) * 5 / 4, abs=0.005)


def test_bootstrap():
    assert bootstrap([np.full(6, 2.0)]) == (2, 2)
    low, high = bootstrap([np.random.default_rng(1).normal(3, 1, 400)])
    assert low == pytest.approx(3 - 1.96 / 20, abs=0.1) and high == pytest.approx(3 + 1.96 / 20, abs=0.1)
    assert bootstrap([np.arange(9)]) == bootstrap([np.arange(9)])
    assert all(map(math.isnan, bootstrap([np.arange(9), np.arange(5)])))  # a task of too few


@pytest.mark.parametrize("count", [6, 8, 16])
def test_intervals_of_few_seeds_cover_what_they_say(count):
    """Plain percentiles cover 88 % with 6 and with 8 values."""
    samples = np.random.default_rng(1).normal(size=(600, count))
    bounds = [bootstrap([values], resamples=1000) for values in samples]
    assert np.mean([low <= 0 <= high for low, high in bounds]) == pytest.approx(0.95, abs=0.03)


def test_bands_of_few_are_their_range():
    assert band(np.array([0.3, 0.1, 0.2]), 100) == (0.1, 0.3)
    assert band(np.arange(9), 100) == bootstrap([np.arange(9)], resamples=100)


def test_a_comparison_over_tasks():
    found = compare([np.array([1.0, 3.0]), np.array([5.0, 5.0, 5.0]), np.array([])])
    assert found.pairs == 5 and found.mean == (2 + 5) / 2
    assert found.sd == 1  # of variances 2 and 0
    assert found.p == 2 / 2**5
    # Five pairs cannot reach 5 %, and three say little of their spread.
    assert all(map(math.isnan, (found.low, found.high, found.detectable)))


def test_a_comparison_of_enough():
    one, other = np.array([1.0, 3.0] * 4), np.full(6, 5.0)
    found = compare([one, other])
    assert found.sd == pytest.approx(math.sqrt(8 / 7 / 2))  # of variances 8 / 7 and 0
    assert found.detectable == pytest.approx(detectable(math.sqrt(1 / 7) / 2, 12))
    assert (found.low, found.high) == bootstrap([one, other])


def test_what_holms_correction_cannot_reach_is_not_detectable():
    """Six pairs reach p = 1 / 32, which is above 5 % where two are compared; seven reach 1 / 64."""
    assert math.isnan(compare([np.arange(6.0)], 2).detectable)
    found = compare([np.arange(7.0)], 2)
    assert found.detectable == pytest.approx(detectable(found.sd / math.sqrt(7), 6, 0.025))
    assert found.detectable > compare([np.arange(7.0)]).detectable > 0
    assert math.isnan(compare([np.arange(7.0)], 4).detectable)


def test_a_comparison_of_too_little():
    one = compare([np.array([0.5])])
    assert (one.pairs, one.mean, one.p) == (1, 0.5, 1) and math.isnan(one.sd) and math.isnan(one.low)
    none = compare([np.array([])])
    assert none.pairs == 0 and math.isnan(none.mean) and math.isnan(none.p)


def test_correlation():
    assert correlation([1, 2, None, 3], [2, 4, 9, 6]) == pytest.approx(1)
    assert math.isnan(correlation([1, 1, 1], [1, 2, 3])) and math.isnan(correlation([None], [1]))
