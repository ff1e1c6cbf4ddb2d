"""Prompts and parsers of adapters: their observations have the rules of the game in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from empg_envs.base import Message, PlainParser, quote_turns
from empg_envs.guided import GuidedPrompts
from empg_envs.parsers import CallParser, WholeParser

_ANSWER = "A response without a call is your answer, and ends the task."


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


def make_whole_parser(instructions: str = "") -> WholeParser:
    """Build the parser of environments that read the whole answer; a thought is no part of it."""
    return WholeParser()


def make_line_parser(instructions: str = "", list_actions: bool = True) -> PlainParser:
    """Build the parser of environments whose actions are lines; it accepts the options of the prompts."""
    return PlainParser()


class PrecededPrompts(GuidedPrompts):
    """A prompt builder whose conversations begin with the messages of ``info["before"]``."""

    def start(self, observation: str, info: Mapping[str, Any]) -> list[Message]:
        """Return those messages, then one user message: instructions and observation."""
        return [*info.get("before", ()), *super().start(observation, info)]

    def recall(
        self, history: Sequence[tuple[str, str]], observation: str, info: Mapping[str, Any], turn: int
    ) -> list[Message]:
        """Return those messages, then the remembered turns and the observation."""
        return [*info.get("before", ()), *super().recall(history, observation, info, turn)]


def make_preceded_prompts(instructions: str = "") -> PrecededPrompts:
    """Build the prompt builder of environments with a system prompt or examples of their own."""
    return PrecededPrompts(instructions)


class ToolPrompts(GuidedPrompts):
    """A prompt builder of tasks that an answer without a call ends; the tools are told in front of it."""

    def start(self, observation: str, info: Mapping[str, Any]) -> list[Message]:
        """Return one user message: how the task ends, instructions and task."""
        (message,) = super().start(observation, info)
        return [{**message, "content": f"{_ANSWER}\n\n{message['content']}"}]

    def recall(
        self, history: Sequence[tuple[str, str]], observation: str, info: Mapping[str, Any], turn: int
    ) -> list[Message]:
        """Return task, the remembered turns, and the last result."""
        (task,) = self.start(str(info.get("task", "")), info)
        text = f"{task['content']}\n\n{quote_turns(history, turn)}\n\nThe last result: {observation}"
        return [{**task, "content": text}]


def make_tool_prompts(instructions: str = "") -> ToolPrompts:
    """Build the prompt builder of tool servers; ``instructions`` stand in front of the task."""
    return ToolPrompts(instructions)


def make_call_parser(instructions: str = "") -> CallParser:
    """Build the parser of environments whose actions are tool calls, or an answer without one."""
    return CallParser(has_answers=True)
