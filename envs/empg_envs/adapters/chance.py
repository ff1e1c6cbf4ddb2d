"""Random numbers of one's own for code that draws from the process' generators."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any


class Chance:
    """The states of ``random`` and of NumPy's old generator as one game left them."""

    def __init__(self) -> None:
        """Begin with the process' states."""
        self._states = _take()

    @contextlib.contextmanager
    def reigning(self, seed: int | None = None) -> Iterator[None]:
        """Put these states in place of the process' for a while, or seed them first."""
        outside = _take()
        if seed is None:
            _put(self._states)
        else:
            random.seed(seed)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed(seed % 2**32)
        try:
            yield
        finally:
            self._states = _take()
            _put(outside)


def _take() -> tuple[Any, Any]:
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()


def _put(states: tuple[Any, Any]) -> None:
    random.setstate(states[0])
    if states[1] is not None:
        sys.modules["numpy"].random.set_state(states[1])
