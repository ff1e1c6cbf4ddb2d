"""The numbers of runs that are compared: areas, intervals, tests of pairs, as pure functions.

Whatever draws random numbers draws them from a fixed seed, so that the same runs give the same report.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import ndtr, stdtrit

RESAMPLES = 10_000  # of a bootstrap
AT_ONCE = 2**22  # values that are drawn at a time: thousands of tasks would take gigabytes
EXACT_PAIRS = 16  # up to here every one of the 2^n signs is tried
SIGNS = 100_000  # signs that are sampled beyond
POWER, LEVEL = 0.8, 0.05
FEWEST = 6  # fewer pairs never reach the level: of n signs, all alike, 2 in 2^n are as extreme

Curve = Sequence[tuple[int, float]]  # updates, ascending, and the success after them
Statistic = Callable[[np.ndarray], np.ndarray]  # over the last axis


@dataclasses.dataclass(frozen=True)
class Difference:
    """What pairs of runs say about two arms: the mean over tasks of the mean difference over seeds.

    Attributes:
      pairs: number of pairs over all tasks.
      mean: the difference.
      low, high: 95 % bootstrap interval, seeds resampled within each task; NaN below six pairs in a task.
      p: two-sided p-value of the sign-flip test.
      sd: standard deviation of the differences within a task (root mean square over tasks).
      detectable: the smallest true difference that such pairs find with 80 % power at the 5 % level, divided
        by the number of comparisons; NaN of so few pairs that they cannot reach that level.
    """

    pairs: int
    mean: float
    low: float
    high: float
    p: float
    sd: float
    detectable: float


def finite(value: object) -> int | float | None:
    """Return a value that is a number and that a float can hold; None for any other, as a damaged log has."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # a whole number without end
        return None


def area(curve: Curve) -> float:
    """Compute the mean height of the curve over updates: trapezoids, divided by the last update; in [0, 1].

    A single point is its own mean, as are several at one update.
    """
    if curve[0][0] == curve[-1][0]:
        return sum(value for _, value in curve) / len(curve)
    pieces = [(b - a) * (x + y) / 2 for (a, x), (b, y) in itertools.pairwise(curve)]
    return sum(pieces) / (curve[-1][0] - curve[0][0])


def updates_to(curve: Curve, level: float) -> float | None:
    """Find the update at which the curve, linear between its points, first reaches a level; None if never."""
    if curve[0][1] >= level:
        return float(curve[0][0])
    for (a, x), (b, y) in itertools.pairwise(curve):
        if y >= level:
            return a + (b - a) * (level - x) / (y - x)
    return None


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Compute the mean of the middle half over the last axis: n // 4 values are left out at each end."""
    ordered = np.sort(np.asarray(values, np.float64), axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1)


def mean(values: np.ndarray) -> np.ndarray:
    """Compute the mean over the last axis."""
    return np.asarray(values, np.float64).mean(axis=-1)


def bootstrap(
    tasks: Sequence[np.ndarray], statistic: Statistic = mean, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Compute the 95 % interval of the mean over tasks of a statistic, by resampling seeds within each task.

    Percentiles of a bootstrap of few values lie too close together (of 8 values they cover 88 %). They are
    taken further out, by what Student's t with n - 1 degrees and the unbiased variance ask for (Hesterberg
    2015, "What Teachers Should Know About the Bootstrap", expanded percentiles); n: the smallest task's.

    Returns:
      Lower and upper bound; NaN where a task has fewer than six values, which resampling says too little of.
    """
    if not tasks or min(map(len, tasks)) < FEWEST:
        return math.nan, math.nan
    generator, total, fewest = np.random.default_rng(0), np.zeros(resamples), min(map(len, tasks))
    for values in tasks:
        values = np.asarray(values, np.float64)
        for part in np.array_split(total, -(-resamples * len(values) // AT_ONCE)):  # views of the total
            part += statistic(values[generator.integers(len(values), size=(len(part), len(values)))])
    tail = ndtr(-math.sqrt(fewest / (fewest - 1)) * stdtrit(fewest - 1, 1 - LEVEL / 2))
    low, high = np.quantile(total / len(tasks), [tail, 1 - tail])
    return float(low), float(high)


def band(values: np.ndarray, resamples: int) -> tuple[float, float]:
    """Compute the band around a mean in a picture: its 95 % interval; the range of fewer than six values."""
    if len(values) < FEWEST:
        return float(np.min(values)), float(np.max(values))
    return bootstrap([values], resamples=resamples)


def sign_flip(tasks: Sequence[np.ndarray]) -> float:
    """Compute the two-sided p-value of paired differences.

    It says how often random signs give a mean at least this large.

    Under the hypothesis of no effect each difference is as likely as its negative. All signs are tried for up
    to 16 pairs; beyond, 100,000 are sampled, and the observed ones count as one more.
    """
    parts = [np.asarray(values, np.float64) / (len(tasks) * len(values)) for values in tasks]
    terms = np.concatenate(parts)
    # A sum in another order may be off by rounding and is still the same sum.
    bound = abs(terms.sum()) - 1e-9 * np.abs(terms).sum()
    if len(terms) <= EXACT_PAIRS:
        sums = np.zeros(1)
        for term in terms:
            sums = np.concatenate([sums + term, sums - term])
        return float(np.mean(np.abs(sums) >= bound))
    signs = np.random.default_rng(0).integers(0, 2, size=(SIGNS, len(terms)), dtype=np.int8) * 2 - 1
    return float((1 + np.sum(np.abs(signs @ terms) >= bound)) / (1 + SIGNS))


def holm(p_values: Sequence[float]) -> list[float]:
    """Compute Holm's adjusted p-values of a family, in the given order.

    NaN, a comparison without data yet, stays and counts as one of the family: what is not known cannot make
    the others more certain.
    """
    known = [number for number, p in enumerate(p_values) if not math.isnan(p)]
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, number in enumerate(sorted(known, key=lambda number: p_values[number])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def detectable(standard_error: float, degrees: int, level: float = LEVEL) -> float:
    """Compute the true difference found with 80 % power at a two-sided level.

    Args:
      standard_error: of the mean difference.
      degrees: degrees of freedom of its estimate (Student's t); pairs minus tasks.
      level: of the test.
    """
    return float(stdtrit(degrees, 1 - level / 2) + stdtrit(degrees, POWER)) * standard_error


def compare(tasks: Sequence[np.ndarray], comparisons: int = 1) -> Difference:
    """Describe paired differences.

    Args:
      tasks: one array over seeds per task; tasks without a pair are left out.
      comparisons: number of comparisons that are tested together. Holm's correction tests the first of them
        at 5 % divided by it, which is the level of what can be detected.
    """
    tasks = [np.asarray(values, np.float64) for values in tasks if len(values)]
    if not tasks:
        return Difference(0, *[math.nan] * 6)
    center = float(np.mean([values.mean() for values in tasks]))
    low, high = bootstrap(tasks)
    sd, smallest, pairs = math.nan, math.nan, sum(map(len, tasks))
    if min(map(len, tasks)) > 1:
        variances = [float(values.var(ddof=1)) for values in tasks]
        sd = math.sqrt(sum(variances) / len(tasks))
        shares = [each / len(values) for each, values in zip(variances, tasks, strict=True)]
        if 2 / 2**pairs <= LEVEL / comparisons:  # all signs alike
            error = math.sqrt(sum(shares)) / len(tasks)
            smallest = detectable(error, pairs - len(tasks), LEVEL / comparisons)
    return Difference(pairs, center, low, high, sign_flip(tasks), sd, smallest)


def correlation(first: Sequence[float | None], second: Sequence[float | None]) -> float:
    """Compute Pearson's correlation where both are known; NaN where one of them is constant."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    x, y = np.array(pairs, np.float64).reshape(-1, 2).T
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])
