"""Random lengths: a mean and a kind of spread around it."""

from __future__ import annotations

import dataclasses
import math
import random

KINDS = ("constant", "uniform", "exponential", "lognormal", "heavy")
SIGMA = 1.0  # lognormal: the standard deviation of the logarithm; one draw in 20 is above 3 times the mean
TAIL = 1.5  # heavy: the exponent of a Pareto distribution, whose variance is infinite


@dataclasses.dataclass(frozen=True)
class Spread:
    """A distribution of positive numbers.

    Attributes:
      mean: the mean.
      kind: ``constant``; ``uniform`` between 0 and twice the mean; ``exponential``; ``lognormal``; ``heavy``,
        a Pareto distribution with exponent 1.5.
    """

    mean: float
    kind: str = "constant"

    def draw(self, chance: random.Random) -> float:
        """Draw a number."""
        mean = self.mean
        match self.kind:
            case "constant":
                return mean
            case "uniform":
                return chance.uniform(0.0, 2 * mean)
            case "exponential":
                return chance.expovariate(1.0) * mean
            case "lognormal":
                return mean * chance.lognormvariate(-SIGMA * SIGMA / 2, SIGMA)
            case "heavy":
                return mean * (TAIL - 1) / TAIL * chance.paretovariate(TAIL)
        raise ValueError(f"kind {self.kind!r} is unknown; choose {', '.join(KINDS)}")

    def draw_count(self, chance: random.Random) -> int:
        """Draw a whole number from 1 on with the same mean, which is at least 1."""
        value = Spread(self.mean - 1, self.kind).draw(chance) if self.mean > 1 else 0.0
        whole = math.floor(value)
        # Rounded up as often as the fraction says: rounding to the nearest would move the mean.
        return 1 + whole + (value > whole and chance.random() < value - whole)
