"""Beside the engine: prompts made of observations, actions read out of responses, a closed vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from empg_envs.base import ActionParser, Message, ParsedAction, PlainPrompts, PromptBuilder, quote_turns
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
      style: ``terse`` (nothing but the observation) or ``alfworld`` (with instructions).
      list_admissible: whether every prompt ends with the admissible commands.
      parser: the parser that will read the answer; the instructions ask for its format.
      require_admissible: concerns the parser alone.

    Raises:
      ValueError: an unknown style or parser, or ``terse`` with ``tags``, which it cannot ask for.
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

    It takes the same options as `make_prompts`; style and listing do not change how an answer is read.

    Args:
      parser: ``plain`` (the first line) or ``tags`` (think and action tags).
      style: concerns the prompts alone.
      list_admissible: concerns the prompts alone.
      require_admissible: a well-formed command that would do nothing is invalid too (``plain`` only), so
        that ``env.invalid_penalty`` tells the policy at once what a sparse reward tells it late.

    Raises:
      ValueError: an unknown parser, or ``tags`` with ``require_admissible``.
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
    """The observation itself, followed by the admissible commands if they are to be listed."""

    def __init__(self, list_admissible: bool = False) -> None:
        """Initialize with ``list_admissible``: whether to list the admissible commands after the
        observation.
        """
        self._list_admissible = list_admissible

    def start(self, observation: str, info: Mapping[str, Any]) -> list[Message]:
        """Return one user message."""
        return [{"role": "user", "content": self.follow(observation, info)}]

    def follow(self, observation: str, info: Mapping[str, Any]) -> str:
        """Return the observation, and the commands after ``actions :`` divided by commas."""
        if not self._list_admissible:
            return observation
        return f"{observation} . actions : {' , '.join(_offered(info))}"


class AlfworldPrompts(PlainPrompts):
    """Instructions, observation, admissible commands; one growing transcript or fresh windows."""

    def __init__(self, list_admissible: bool = False, parser: str = "plain", role: str = _ROLE) -> None:
        """Choose what is said beside the observations.

        Args:
          list_admissible: list admissible commands.
          parser: the answer format to ask for.
          role: who the agent is; the first words of every prompt.
        """
        self._list_admissible, self._role = list_admissible, role
        self._answer = (_CHOICE if list_admissible else _ANSWER)[parser]

    def start(self, observation: str, info: Mapping[str, Any]) -> list[Message]:
        """Return one user message: role, observation (which holds the task), commands, answer format."""
        parts = [self._role, f"Observation: {observation}", *self._offer(info), self._answer]
        return [{"role": "user", "content": "\n\n".join(parts)}]

    def follow(self, observation: str, info: Mapping[str, Any]) -> str:
        """Return the observation, with the admissible commands if they are to be listed."""
        return "\n\n".join([f"Observation: {observation}", *self._offer(info)])

    def recall(
        self,
        history: Sequence[tuple[str, str]],
        observation: str,
        info: Mapping[str, Any],
        turn: int,
    ) -> list[Message]:
        """Return a fresh prompt: role, task, the remembered turns with their numbers, the present."""
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
        listed = "\n ".join(f"'{command}'" for command in _offered(info))
        return [f"Admissible commands now: [{listed}]."]


def _offered(info: Mapping[str, Any]) -> list[str]:
    return [command for command in info["admissible"] if command != "help"]


class LineParser:
    """The first line of the response is the command; it is valid when it follows the grammar.

    With ``require_admissible`` it must also be a command that would do something in the present state.
    """

    def __init__(self, require_admissible: bool = False) -> None:
        """Choose what counts as valid."""
        self._require_admissible = require_admissible

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Strip, lower-cases and collapses blanks; an ill-formed line is passed on as it is."""
        lines = response.strip().splitlines()
        action = commands.normalize(lines[0]) if lines else ""
        is_valid = commands.parse(action) is not None
        if self._require_admissible:
            is_valid = is_valid and action in info.get("admissible", ())
        return ParsedAction(action=action, is_valid=is_valid)


def phrases(level: str = "tiny", style: str = "terse", max_turns: int | None = None) -> list[str]:
    """Return the closed vocabulary of a level in the terse style, for a small tokenizer.

    Every text of the terse style and every well-formed command about things of the level is a
    sequence of these phrases divided by single spaces, when the longest match is taken each time.

    Args:
      level: the level's name.
      style: the environment's style; only ``terse`` has a closed vocabulary.
      max_turns: the environment's limit; the vocabulary does not depend on it.

    Returns:
      Phrases (some hold spaces), sorted, none twice.

    Raises:
      ValueError: an unknown level, or another style.
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
