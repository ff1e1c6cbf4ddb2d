"""Random lengths have the mean that is asked for, whatever their kind."""

import random
import statistics

import pytest

from empg_jax.simulate.spread import KINDS, Spread


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "heavy"])
@pytest.mark.parametrize("mean", [0.1, 1.0, 7.3])
def test_the_mean_is_kept(kind, mean):
    chance = random.Random(0)
    drawn = [Spread(mean, kind).draw(chance) for _ in range(40_000)]
    assert min(drawn) >= 0 and statistics.fmean(drawn) == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "heavy"])
@pytest.mark.parametrize("mean", [1.0, 1.5, 7.3])
def test_counts_are_whole_and_keep_the_mean(kind, mean):
    chance = random.Random(0)
    drawn = [Spread(mean, kind).draw_count(chance) for _ in range(40_000)]
    assert min(drawn) >= 1 and all(isinstance(count, int) for count in drawn)
    assert statistics.fmean(drawn) == pytest.approx(mean, rel=0.03)


def test_a_heavy_tail_has_a_known_quantile():
    # A Pareto distribution with exponent 1.5 and mean 3 begins at 1; a share of x ** -1.5 lies above x.
    chance = random.Random(0)
    drawn = sorted(Spread(3.0, "heavy").draw(chance) for _ in range(40_000))
    assert drawn[0] >= 1
    assert drawn[20_000] == pytest.approx(2 ** (1 / 1.5), rel=0.02)
    assert drawn[39_600] == pytest.approx(100 ** (1 / 1.5), rel=0.15)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'odd' is unknown; choose constant, uniform"):
        Spread(1.0, "odd").draw(random.Random(0))
