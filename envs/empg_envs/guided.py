"""Prompts that put instructions in front of an environment's own texts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from empg_envs.base import Message, PlainPrompts
from empg_envs.tool_calls import declares_tools


class GuidedPrompts(PlainPrompts):
    """A prompt builder that begins with instructions and can list the possible actions after observations."""

    def __init__(self, instructions: str = "", list_actions: bool = False) -> None:
        """Set the words in front of the first observation, and whether actions are listed."""
        self._instructions, self._list_actions = instructions, list_actions
        self._act = ""  # asks for a call of a tool that is ours

    def asking(self, request: str, *, is_call: bool = False) -> GuidedPrompts:
        """Return the same prompts with one more instruction.

        Args:
          request: the instruction.
          is_call: it asks for a call of a tool ``act``, so that it is left out where the environment declares
            tools of its own.
        """
        found = copy.copy(self)  # of the same kind
        if is_call:
            found._act = request
        else:
            found._instructions = f"{self._instructions}\n{request}".strip()
        return found

    def start(self, observation: str, info: Mapping[str, Any]) -> list[Message]:
        """Return one user message: instructions and observation."""
        return [{"role": "user", "content": self._introduce(self.follow(observation, info), info)}]

    def follow(self, observation: str, info: Mapping[str, Any]) -> str:
        """Return the observation, with the possible actions where they are listed."""
        actions = info.get("admissible") if self._list_actions else None
        return f"{observation}\nActions: {', '.join(actions)}" if actions else observation

    def recall(
        self, history: Sequence[tuple[str, str]], observation: str, info: Mapping[str, Any], turn: int
    ) -> list[Message]:
        """Return the remembered turns and the observation; the first message has the instructions."""
        first, *others = super().recall(history, observation, info, turn)
        return [{**first, "content": self._introduce(first["content"], info)}, *others]

    def _introduce(self, text: str, info: Mapping[str, Any]) -> str:
        said = self._instructions if declares_tools(info) else f"{self._instructions}\n{self._act}".strip()
        return f"{said}\n\n{text}" if said else text
