"""Prompts of adapters: the observation, which has the rules in it, after instructions of the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from empg_envs.base import Message, PlainParser, PlainPrompts
from empg_envs.parsers import CallParser, WholeParser


class GuidedPrompts(PlainPrompts):
    """A prompt builder that begins with instructions and can list the possible actions after observations."""

    def __init__(self, instructions: str = "", list_actions: bool = False) -> None:
        """Set the words in front of the first observation, and whether actions are listed."""
        self._instructions, self._list_actions = instructions, list_actions

    def start(self, observation: str, info: Mapping[str, Any]) -> list[Message]:
        """Return one user message: instructions and observation."""
        return [{"role": "user", "content": self._introduce(self.follow(observation, info))}]

    def follow(self, observation: str, info: Mapping[str, Any]) -> str:
        """Return the observation, with the possible actions where they are listed."""
        actions = info.get("admissible") if self._list_actions else None
        return f"{observation}\nActions: {', '.join(actions)}" if actions else observation

    def recall(
        self, history: Sequence[tuple[str, str]], observation: str, info: Mapping[str, Any], turn: int
    ) -> list[Message]:
        """Return the remembered turns and the observation; the first message has the instructions."""
        first, *others = super().recall(history, observation, info, turn)
        return [{**first, "content": self._introduce(first["content"])}, *others]

    def _introduce(self, text: str) -> str:
        return f"{self._instructions}\n\n{text}" if self._instructions else text


def make_prompts(instructions: str = "") -> GuidedPrompts:
    """Build the prompt builder; ``instructions`` stand in front of the first observation."""
    return GuidedPrompts(instructions)


def make_listing_prompts(instructions: str = "", list_actions: bool = True) -> GuidedPrompts:
    """Build the prompt builder of environments with named actions.

    Args:
      instructions: words in front of the first observation.
      list_actions: whether every observation ends with the possible actions.
    """
    return GuidedPrompts(instructions, list_actions)


def make_whole_parser() -> WholeParser:
    """Build the parser of environments that read the whole answer; a thought is no part of it."""
    return WholeParser()


def make_line_parser() -> PlainParser:
    """Build the parser of environments whose actions are lines."""
    return PlainParser()


def make_call_parser() -> CallParser:
    """Build the parser of environments whose actions are tool calls."""
    return CallParser()
