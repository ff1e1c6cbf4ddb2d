"""Reproducible random choices that are seeded by a name."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any


class Draw:
    """A random generator seeded by a name; it is the same on every machine and in every process."""

    def __init__(self, *name: object) -> None:
        """Seed the generator with the parts of a name; different names give independent choices."""
        digest = hashlib.blake2b("/".join(map(str, name)).encode(), digest_size=16).digest()
        self._random = random.Random(int.from_bytes(digest, "big")).random

    def below(self, stop: int) -> int:
        """Return an integer in [0, stop)."""
        return int(self._random() * stop)

    def between(self, bounds: tuple[int, int]) -> int:
        """Return an integer in [fewest, most]."""
        return bounds[0] + self.below(bounds[1] - bounds[0] + 1)

    def weighted(self, items: Sequence[Any], weights: Sequence[int]) -> Any:
        """Return one item, with probability in proportion to its weight."""
        left = self.below(sum(weights))
        for item, weight in zip(items, weights, strict=True):
            left -= weight
            if left < 0:
                return item
        raise AssertionError("weights must be positive")

    def sample(self, items: Sequence[Any], count: int) -> list[Any]:
        """Return ``count`` different items in random order."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(count)]
