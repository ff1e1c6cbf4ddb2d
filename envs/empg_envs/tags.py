"""Answers as ``<think>…</think><action>…</action>``, read by the rules of verl-agent, for any environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from empg_envs.base import ParsedAction

_OPEN, _CLOSE = "<action>", "</action>"
_CJK = re.compile("[\u4e00-\u9fff]")


class TagParser:
    """``<think>…</think><action>…</action>`` by the rules of verl-agent.

    The action is the text between the first ``<action>`` and the first ``</action>``, lower-cased and
    stripped (nothing, if the closing tag comes first). A response without both action tags, without both
    think tags (these in lower case), or with CJK characters is invalid; without both action tags its last
    characters are what is sent. Validity says nothing about whether the action follows the environment's
    grammar.
    """

    def __init__(self, fallback_characters: int = 30) -> None:
        """Initialize with ``fallback_characters``: how much of the end of a response without action tags is
        sent.
        """
        self._fallback_characters = fallback_characters

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Read the tagged action."""
        lowered = response.lower()
        start, end = lowered.find(_OPEN), lowered.find(_CLOSE)
        if start < 0 or end < 0:
            return ParsedAction(action=lowered[-self._fallback_characters :], is_valid=False)
        has_thought = "<think>" in response and "</think>" in response
        is_valid = has_thought and _CJK.search(response) is None
        return ParsedAction(action=lowered[start + len(_OPEN) : end].strip(), is_valid=is_valid)
