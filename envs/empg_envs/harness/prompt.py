"""The texts of a program: it writes the prompts itself, and its answer is the whole response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from empg_envs.base import ParsedAction, PlainPrompts


class WholeResponse:
    """A parser that hands on the whole response; a blank one is invalid."""

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Return the response."""
        return ParsedAction(response, is_valid=bool(response.strip()))


def make_prompts() -> PlainPrompts:
    """Build the prompt builder; the messages of calls stand in ``info``."""
    return PlainPrompts()


def make_parser() -> WholeResponse:
    """Build the parser."""
    return WholeResponse()
