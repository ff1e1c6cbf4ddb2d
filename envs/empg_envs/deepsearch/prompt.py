"""Prompts, parsers of tool calls, and a closed vocabulary for small models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from empg_envs.base import ActionParser, Message, ParsedAction, PlainPrompts, PromptBuilder
from empg_envs.deepsearch.env import PIECE_WORDS, find_level
from empg_envs.deepsearch.pages import PIECE_MARK
from empg_envs.deepsearch.tables import KIND_OF_VALUE
from empg_envs.deepsearch.tags import (
    BROWSE,
    OPEN,
    TOOLS,
    count_openings,
    cut_after_first_close,
    iter_blocks,
    read_call,
)
from empg_envs.deepsearch.texts import TEXTS
from empg_envs.deepsearch.worlds import names_of

PARSERS = ("search_r1", "verl_agent")

_ROLE = (
    "Answer the question below. Whenever you learn something new, first think about it between <think> and "
    "</think>."
)
_SEARCH = (
    "If you miss some knowledge, ask the search engine for it with <search>what you look for</search>; what "
    "it finds comes back between <information> and </information>. You may search as often as you need."
)
_OPEN = "The results are beginnings only: read a whole one with <open>its id</open>."
_BROWSE = (
    "The results are beginnings only: read the page of one with <browse>its title</browse>. A long page "
    "comes in pieces; <browse>its title #2</browse> is the second one."
)
_ANSWER = (
    "As soon as nothing is missing, give the answer alone, in few words, between <answer> and </answer>, for "
    "example <answer>Oslo</answer>."
)


def make_prompts(style: str = "terse", parser: str = "search_r1") -> PromptBuilder:
    """Build the prompt builder that fits an environment's style.

    Args:
      style: ``terse`` (only the observation) or ``search_r1`` (with instructions).
      parser: ignored; it only affects the parser.

    Raises:
      ValueError: an unknown style or parser.
    """
    _check_parser(parser)
    if style not in TEXTS:
        raise ValueError(f"unknown deepsearch prompt style {style!r}; the styles are {', '.join(TEXTS)}")
    return PlainPrompts() if style == "terse" else SearchPrompts()


def make_parser(parser: str = "search_r1", *, style: str = "terse") -> ActionParser:
    """Build the action parser.

    Args:
      parser: ``search_r1`` (the first complete block) or ``verl_agent`` (stricter about validity).
      style: ignored; it only affects the prompts.

    Raises:
      ValueError: an unknown parser.
    """
    _check_parser(parser)
    return FirstBlockParser() if parser == "search_r1" else OneBlockParser()


def _check_parser(parser: str) -> None:
    if parser not in PARSERS:
        raise ValueError(f"unknown deepsearch parser {parser!r}; the parsers are {', '.join(PARSERS)}")


class SearchPrompts(PlainPrompts):
    """A prompt builder with instructions and question, for a transcript or for windows of the last calls."""

    def start(self, observation: str, info: Mapping[str, Any]) -> list[Message]:
        """Return one user message: instructions and question."""
        reading = [text for tool, text in ((OPEN, _OPEN), (BROWSE, _BROWSE)) if tool in info.get("tools", ())]
        parts = [_ROLE, _SEARCH, *reading, _ANSWER]
        return [{"role": "user", "content": f"{' '.join(parts)}\nQuestion: {info['task']}\n"}]

    def follow(self, observation: str, info: Mapping[str, Any]) -> str:
        """Return the observation, which is the search engine's answer."""
        return observation

    def recall(
        self,
        history: Sequence[tuple[str, str]],
        observation: str,
        info: Mapping[str, Any],
        turn: int,
    ) -> list[Message]:
        """Return a fresh prompt: instructions, question, and the last calls with their results."""
        (message,) = self.start(observation, info)
        # An observation is the result of the call before it, so pair each call with the next observation.
        brought = [*(seen for seen, _ in history[1:]), observation]
        first = turn - len(history) + 1
        past = "\n".join(
            f"Step {number}:{call} {seen.strip()}"
            for number, ((_, call), seen) in enumerate(zip(history, brought, strict=False), start=first)
        )
        told = f"\nYou have taken {turn} steps so far. " + (
            f"The last {len(history)} of them:\n{past}\n" if history else f"{observation.strip()}\n"
        )
        return [{"role": "user", "content": message["content"] + told}]


class FirstBlockParser:
    """A parser by the rules of Search-R1: the action is the first complete block.

    The text around the block is ignored. A response without a block is invalid and gives the empty action.
    """

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Read the call."""
        call = read_call(response, info.get("tools", TOOLS))
        return ParsedAction("" if call is None else str(call), call is not None)


class OneBlockParser:
    """A parser by the rules of verl-agent's search environment, where more than one block is an error.

    The text after the first closing tag is dropped, and the first block of the rest is the action. A response
    with blocks of two tools or with two opening tags is invalid, but its action is still carried out. A
    response without a block is invalid and gives the empty action. The case of tags does not matter.
    """

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Read the call."""
        tools = info.get("tools", TOOLS)
        text = _lower_tags(response, tools)
        call = next(iter_blocks(cut_after_first_close(text, tools), tools), None)
        if call is None or not call.content:
            return ParsedAction("", False)
        return ParsedAction(str(call), count_openings(text, tools) == 1)


def _lower_tags(text: str, tools: Sequence[str]) -> str:
    return re.sub(
        rf"</?(?:{'|'.join(tools)})>", lambda match: match.group().lower(), text, flags=re.IGNORECASE
    )


def phrases(level: str = "tiny", style: str | None = None, **options: Any) -> list[str]:
    """Return the closed vocabulary of a level in the terse style, for a small tokenizer.

    Every observation of the terse style, and every call about names of the level, is a sequence of these
    phrases, with the longest match taken each time.

    Args:
      level: the level's name.
      style: the environment's style; only ``terse`` has a closed vocabulary.
      **options: the environment's other options. With ``questions`` there is no closed vocabulary.

    Returns:
      Phrases without duplicates; some contain spaces.

    Raises:
      ValueError: the level is unknown, or the style or the questions have no closed vocabulary.
    """
    if style not in (None, "terse") or options.get("questions") is not None:
        raise ValueError(
            "only embedded deepsearch worlds in style 'terse' have a closed vocabulary; else name a tokenizer"
        )
    preset = find_level(level)
    found = [f"{mark}{tool}>" for tool in TOOLS for mark in ("<", "</")]
    found += [name for names in names_of(preset).values() for name in names]
    found += [*KIND_OF_VALUE, "of", "question :", "answered", "invalid", "nothing", "no more", ".", ",", ":"]
    limits = [options.get(name) for name in ("snippet_words", "passage_words")]
    if BROWSE in (options.get("tools") or ()):
        piece_words = options.get("piece_words") or PIECE_WORDS
        limits.append(piece_words)
        most = -(
            -4 * (preset.facts + 1) // piece_words
        )  # a fact has at most four words, as have name and stops
        found += [f"<{BROWSE}>", f"</{BROWSE}>", *(f"{PIECE_MARK}{number}" for number in range(2, most + 1))]
    elif options.get("snippet_words") is not None:
        found += [str(number) for number in range(1, preset.pages + 1)]
    if any(limit is not None for limit in limits):
        # A passage may be cut inside a name, so single words of names are phrases too.
        found += [word for names in names_of(preset).values() for name in names for word in name.split()]
    return list(dict.fromkeys(found))
