"""A parser of responses ``<think>…</think><action>…</action>`` by the rules of verl-agent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from empg_envs.base import ParsedAction

_OPEN, _CLOSE = "<action>", "</action>"
_CJK = re.compile("[\u4e00-\u9fff]")


class TagParser:
    """A parser of ``<think>…</think><action>…</action>`` by the rules of verl-agent.

    The action is the text between the first ``<action>`` and the first ``</action>``, lower-cased and
    stripped. It is empty if the closing tag comes first. A response is invalid without both action tags,
    without both think tags (in lower case), or with CJK characters. Without both action tags, the action is
    the end of the response. The parser does not check the environment's grammar.
    """

    def __init__(self, fallback_characters: int = 30) -> None:
        """Store how many last characters of a response without action tags become the action."""
        self._fallback_characters = fallback_characters

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Parse the tagged action."""
        lowered = response.lower()
        start, end = lowered.find(_OPEN), lowered.find(_CLOSE)
        if start < 0 or end < 0:
            return ParsedAction(action=lowered[-self._fallback_characters :], is_valid=False)
        has_thought = "<think>" in response and "</think>" in response
        is_valid = has_thought and _CJK.search(response) is None
        return ParsedAction(action=lowered[start + len(_OPEN) : end].strip(), is_valid=is_valid)
