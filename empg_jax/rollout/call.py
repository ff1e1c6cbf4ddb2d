"""A function that one thread asks another to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Call(Generic[T]):
    """A function that another thread runs, and its result or error."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._results: list[T] = []
        self._error: BaseException | None = None
        self.is_done = False

    def run(self) -> None:
        """Call the function."""
        try:
            self._results.append(self._function())
        except BaseException as error:
            self._error = error
        self.is_done = True

    def answer(self) -> T:
        """Return the function's result, or raise its error."""
        if self._error is not None:
            raise self._error
        return self._results[0]
