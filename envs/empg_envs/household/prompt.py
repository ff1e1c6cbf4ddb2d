"""Prompts, action parsers, and a closed vocabulary for small models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from empg_envs.base import (
    ActionParser,
    Message,
    ParsedAction,
    PlainPrompts,
    PromptBuilder,
    first_line,
    quote_turns,
)
from empg_envs.household import commands
from empg_envs.household.env import find_level
from empg_envs.household.tables import LAMP, MAX_INSTANCES
from empg_envs.tags import TagParser

PARSERS = ("plain", "tags")

_ROLE = (
    "You are an agent in a household that is described to you in text. Carry out the task by giving one "
    "command at a time.\n"
    "Commands: go to R, open R, close R, take O from R, move O to R, clean O with R, heat O with R, "
    "cool O with R, slice O with O, use O, examine X, look, inventory, help. "
    "R is a receptacle and O an object, each with its number, for example fridge 1. "
    "You can carry one object; what is in a closed receptacle shows when it is open."
)
_ANSWER = {
    "plain": "Answer with one command and nothing else.",
    "tags": (
        "First think step by step about the situation between <think> and </think>. "
        "Then give exactly one command between <action> and </action>."
    ),
}
_CHOICE = {
    "plain": "Answer with one of the admissible commands and nothing else.",
    "tags": (
        "First think step by step about the situation between <think> and </think>. "
        "Then give exactly one of the admissible commands between <action> and </action>."
    ),
}


def make_prompts(
    style: str = "terse",
    list_admissible: bool = False,
    parser: str = "plain",
    require_admissible: bool = False,
) -> PromptBuilder:
    """Build the prompt builder that fits an environment's style.

    Args:
      style: ``terse`` (only the observation) or ``alfworld`` (with instructions).
      list_admissible: whether every prompt ends with the admissible commands.
      parser: the parser of the answers; the instructions ask for its format.
      require_admissible: ignored; it only affects the parser.

    Raises:
      ValueError: the style or parser is unknown, or ``terse``, which has no instructions, is combined with
        ``tags``.
    """
    _check_parser(parser)
    if style == "terse":
        if parser == "tags":
            raise ValueError(
                "household style 'terse' gives no instructions, so it needs parser 'plain', not 'tags'"
            )
        return TersePrompts(list_admissible)
    if style == "alfworld":
        return AlfworldPrompts(list_admissible, parser)
    raise ValueError(f"unknown household prompt style {style!r}; the styles are terse, alfworld")


def make_parser(
    parser: str = "plain",
    *,
    style: str = "terse",
    list_admissible: bool = False,
    require_admissible: bool = False,
) -> ActionParser:
    """Build the action parser.

    It accepts the options of `make_prompts`.

    Args:
      parser: ``plain`` (the first line) or ``tags`` (think and action tags).
      style: ignored; it only affects the prompts.
      list_admissible: ignored; it only affects the prompts.
      require_admissible: whether a well-formed command without effect is invalid, too (``plain`` only).
        ``env.invalid_penalty`` then gives the policy an immediate signal in addition to the sparse reward.

    Raises:
      ValueError: the parser is unknown, or ``tags`` is combined with ``require_admissible``.
    """
    _check_parser(parser)
    if parser == "plain":
        return LineParser(require_admissible)
    if require_admissible:
        raise ValueError("household parser 'tags' follows verl-agent's rules and cannot require_admissible")
    return TagParser()


def _check_parser(parser: str) -> None:
    if parser not in PARSERS:
        raise ValueError(f"unknown household parser {parser!r}; the parsers are {', '.join(PARSERS)}")


class TersePrompts(PlainPrompts):
    """A prompt builder for the terse style: the observation, and optionally the admissible commands."""

    def __init__(self, list_admissible: bool = False) -> None:
        """Set whether the admissible commands are listed after the observation."""
        self._list_admissible = list_admissible

    def start(self, observation: str, info: Mapping[str, Any]) -> list[Message]:
        """Return one user message."""
        return [{"role": "user", "content": self.follow(observation, info)}]

    def follow(self, observation: str, info: Mapping[str, Any]) -> str:
        """Return the observation; the listed commands follow ``actions :`` and are separated by commas."""
        if not self._list_admissible:
            return observation
        return f"{observation} . actions : {' , '.join(_offered(info))}"


class AlfworldPrompts(PlainPrompts):
    """A prompt builder with instructions, observation and admissible commands, for transcript or window."""

    def __init__(self, list_admissible: bool = False, parser: str = "plain", role: str = _ROLE) -> None:
        """Set the text around the observations.

        Args:
          list_admissible: whether to list the admissible commands.
          parser: the parser whose answer format the prompt asks for.
          role: description of the agent's role, the first words of every prompt.
        """
        self._list_admissible, self._role = list_admissible, role
        self._answer = (_CHOICE if list_admissible else _ANSWER)[parser]

    def start(self, observation: str, info: Mapping[str, Any]) -> list[Message]:
        """Return one user message: role, observation (which contains the task), commands, answer format."""
        parts = [self._role, f"Observation: {observation}", *self._offer(info), self._answer]
        return [{"role": "user", "content": "\n\n".join(parts)}]

    def follow(self, observation: str, info: Mapping[str, Any]) -> str:
        """Return the observation, with the admissible commands if they are listed."""
        return "\n\n".join([f"Observation: {observation}", *self._offer(info)])

    def recall(
        self,
        history: Sequence[tuple[str, str]],
        observation: str,
        info: Mapping[str, Any],
        turn: int,
    ) -> list[Message]:
        """Return a fresh prompt: role, task, the numbered past turns, and the current observation."""
        past = quote_turns(history, turn)
        parts = [f"{self._role}\nYour task is to: {info['task']}"]
        if past:
            parts.append(
                f"You have taken {turn} actions. The last {len(history)} observations and actions:\n{past}"
            )
        parts += [
            f"You are now at step {turn + 1}. Observation: {observation}",
            *self._offer(info),
            self._answer,
        ]
        return [{"role": "user", "content": "\n\n".join(parts)}]

    def _offer(self, info: Mapping[str, Any]) -> list[str]:
        if not self._list_admissible:
            return []
        return [f"Admissible commands now: [{quote_commands(info)}]."]


def quote_commands(info: Mapping[str, Any]) -> str:
    """Return the admissible commands but ``help``, each in quotes on a line of its own."""
    return "\n ".join(f"'{command}'" for command in _offered(info))


def _offered(info: Mapping[str, Any]) -> list[str]:
    return [command for command in info["admissible"] if command != "help"]


class LineParser:
    """A parser of the first line behind the thought: a command, valid if it follows the grammar.

    With ``require_admissible`` a valid command must also have an effect in the current state.
    """

    def __init__(self, require_admissible: bool = False) -> None:
        """Set whether a valid command must have an effect."""
        self._require_admissible = require_admissible

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Normalize the command's case and blanks; an ill-formed line is returned unchanged as invalid."""
        action = commands.normalize(first_line(response))
        is_valid = commands.parse(action) is not None
        if self._require_admissible:
            is_valid = is_valid and action in info.get("admissible", ())
        return ParsedAction(action=action, is_valid=is_valid)


def phrases(level: str = "tiny", style: str = "terse", max_turns: int | None = None) -> list[str]:
    """Return the closed vocabulary of a level in the terse style, for a small tokenizer.

    Every text of the terse style, and every well-formed command about objects of the level, is a sequence of
    these phrases separated by single spaces, with the longest match taken each time.

    Args:
      level: the level's name.
      style: the environment's style; only ``terse`` has a closed vocabulary.
      max_turns: the environment's limit; the vocabulary does not depend on it.

    Returns:
      Sorted phrases without duplicates; some contain spaces.

    Raises:
      ValueError: the level is unknown, or the style has no closed vocabulary.
    """
    if style != "terse":
        raise ValueError(f"household style {style!r} has no closed vocabulary; use 'terse' or a tokenizer")
    preset = find_level(level)
    most: Counter[str] = Counter()
    for room in preset.rooms:
        most.update(room.always)
        most.update(room.sometimes)
    copies = MAX_INSTANCES if preset.copies[1] else 1
    most.update({cls: copies for cls in preset.objects})
    most[LAMP] = 1
    found = {f"{cls} {number}" for cls, count in most.items() for number in range(1, count + 1)}
    found |= {cls for cls, count in most.items() if count > 1}
    found |= {room.name for room in preset.rooms}
    found |= {*commands.BARE, *commands.ONE_NOUN, *commands.TWO_NOUNS, *commands.TWO_NOUNS.values()}
    found |= {"put", "put clean", "put hot", "put cool", "put two", "in", "hot", "clean", "cool"}
    found |= {
        ". holding",
        "at",
        "nothing",
        "nothing happens .",
        "door",
        "closed",
        ".",
        ":",
        ". actions :",
        ",",
    }
    return sorted(found)
