"""Action parsers in a rollout: faults of those that are the user's code, and thoughts that a server opens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from empg_envs.answers import describe
from empg_envs.base import ActionParser, ParsedAction
from empg_envs.parsers import OpenThought
from empg_jax.errors import RunError, first_line

_SHOWN = 80  # characters of a response in a message


class ParserFault(RunError):
    """An action parser raised an exception at a response."""


class CheckedParser:
    """An action parser that is checked at every response."""

    def __init__(self, parser: ActionParser) -> None:
        """Set the parser within."""
        kind = parser if hasattr(parser, "__qualname__") else type(parser)
        self._parser, self._name = parser, f"{kind.__module__}.{kind.__qualname__}"

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Parse a response.

        Raises:
          ParserFault: the parser raised an exception.
          RunError: it returned something other than a `ParsedAction` with a text and a bool.
        """
        try:
            found: Any = self._parser(response, info)
        except Exception as error:  # whatever its code raises
            raise ParserFault(
                f"the action parser {self._name} raised {first_line(error)}; the response begins "
                f"{response[:_SHOWN]!r}"
            ) from error
        if not isinstance(found, ParsedAction):
            raise RunError(
                f"the action parser {self._name} returned {describe(found)}; expected a ParsedAction"
            )
        if not isinstance(found.action, str) or not isinstance(found.is_valid, bool):
            raise RunError(
                f"the action parser {self._name} returned {found!r:.200}; expected action of type str and "
                "is_valid of type bool"
            )
        return found


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
