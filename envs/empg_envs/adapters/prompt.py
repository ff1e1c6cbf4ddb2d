"""Prompts and parsers of adapters: their observations have the rules of the game in them."""

from __future__ import annotations

from empg_envs.base import PlainParser
from empg_envs.guided import GuidedPrompts
from empg_envs.parsers import CallParser, WholeParser


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


def make_call_parser(instructions: str = "") -> CallParser:
    """Build the parser of environments whose actions are tool calls."""
    return CallParser()
