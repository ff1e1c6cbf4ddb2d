"""Responses that begin inside a thought, where only the server that samples them knows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from empg_envs.base import ActionParser, ParsedAction
from empg_envs.parsers import OpenThought


class ThoughtfulParser:
    """An action parser of responses that may begin inside a thought: only the server that samples them knows.

    Args:
      parser: the parser within.
      opens_thought: tells whether they do, once the first response is there.
    """

    def __init__(self, parser: ActionParser, opens_thought: Callable[[], bool]) -> None:
        self._parser, self._inside, self._opens_thought = parser, OpenThought(parser), opens_thought

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Parse a response."""
        return (self._inside if self._opens_thought() else self._parser)(response, info)
