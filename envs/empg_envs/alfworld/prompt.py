"""Prompts in the conventions of verl-agent, action parsers, and a closed vocabulary for small models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from empg_envs.alfworld.generator import GeneratedPanels
from empg_envs.alfworld.rooms import PRESETS
from empg_envs.base import ActionParser, Message, ParsedAction, PlainPrompts, PromptBuilder
from empg_envs.household import commands
from empg_envs.household.prompt import AlfworldPrompts, LineParser, quote_commands
from empg_envs.household.tables import LAMP
from empg_envs.household.texts import HELP, NOTHING_HAPPENS
from empg_envs.tags import TagParser
from empg_envs.template import TemplatePrompts

STYLES = ("verl", "compact")
PARSERS = ("tags", "line")
_ROLE = (
    "You act in a room of the ALFRED household, which you know from text alone. Every turn you see an "
    "observation and give one command."
)
_BANNER = "-= Welcome to TextWorld, ALFRED! =-"
_MAX_NUMBER = 20  # largest number of instances of one class in a generated room


def make_prompts(
    style: str = "verl", list_admissible: bool = True, parser: str = "tags", template: str | None = None
) -> PromptBuilder:
    """Build the prompt builder.

    Args:
      style: ``verl`` or ``compact``. ``verl`` has role, observation, admissible commands, and the request to
        think and act in tags; with ``env.context=window`` it also has task, step and past turns, in
        verl-agent's order. ``compact`` is the observation followed by the task, for a small model with its
        own tokenizer.
      list_admissible: whether ``verl`` prompts list the admissible commands (without ``help``).
      parser: the parser of the answers; a ``verl`` prompt asks for its format.
      template: file with a prompt in place of ``verl``'s own words; see `empg_envs.template`. The admissible
        commands are ``{admissible_actions}``.

    Raises:
      ValueError: an unknown style or parser, or a template that cannot be used.
    """
    _check("parser", parser, PARSERS)
    _check("prompt style", style, STYLES)
    if style == "compact":
        if template is not None:
            raise ValueError("an alfworld template goes with style 'verl', not 'compact'")
        return CompactPrompts()
    usual = AlfworldPrompts(list_admissible, "tags" if parser == "tags" else "plain", _ROLE)
    if template is None:
        return usual
    return TemplatePrompts(template, usual, ("admissible_actions", quote_commands))


def make_parser(
    parser: str = "tags", *, style: str = "verl", list_admissible: bool = True, template: str | None = None
) -> ActionParser:
    """Build the action parser; it accepts the options of `make_prompts`.

    Args:
      parser: ``tags`` (think and action tags, verl-agent's rules) or ``line``: the first line is the command,
        lower-cased and with single blanks. It is valid if it follows the grammar of either release.
      style: ignored; it only affects the prompts.
      list_admissible: ignored; it only affects the prompts.
      template: ignored; it only affects the prompts.

    Raises:
      ValueError: an unknown parser.
    """
    _check("parser", parser, PARSERS)
    return TagParser() if parser == "tags" else _Line()


class _Line(LineParser):
    """The household's line parser, extended by the older release's ``put … in/on …``."""

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Parse the first line."""
        parsed = super().__call__(response, info)
        as_new = parsed.action.replace("put ", "move ", 1).replace(" in/on ", " to ", 1)
        is_valid = parsed.is_valid or commands.parse_exact(as_new) is not None
        return ParsedAction(parsed.action, is_valid)


class CompactPrompts(PlainPrompts):
    """A prompt builder that repeats the task after every observation.

    ALFWorld states the task only at the start, and a small model would have to remember it for the whole
    episode.
    """

    def start(self, observation: str, info: Mapping[str, Any]) -> list[Message]:
        """Return one user message: the first observation without its banner; it ends with the task."""
        return [{"role": "user", "content": " ".join(observation.removeprefix(_BANNER).split())}]

    def follow(self, observation: str, info: Mapping[str, Any]) -> str:
        """Return observation and task on one line; the answer to ``help`` is left out."""
        seen = "help" if observation == HELP else observation
        return f"{seen} Your task is to: {info['task']}"


def phrases(level: str = "rooms", **options: Any) -> list[str]:
    """Return the closed vocabulary of ``compact`` prompts and of commands about a level's objects.

    Class and number of a name are two phrases, so that ``book`` in the task and ``book 1`` in a list begin
    with the same token.

    Args:
      level: preset of the generated games.
      **options: the environment's other options. Official games have no closed vocabulary.

    Returns:
      Sorted phrases without duplicates; some contain spaces or punctuation.

    Raises:
      ValueError: an unknown level, or official games.
    """
    if options.get("source") != "generated":
        raise ValueError(
            "only generated games have a closed vocabulary: set env.options.source=generated, or a tokenizer"
        )
    GeneratedPanels(level)
    classes = {LAMP}
    for preset in PRESETS[level]:
        classes.update(preset.objects)
        for room in preset.rooms:
            classes.update((*room.always, *room.sometimes))
    found = {*classes, *map(str, range(1, _MAX_NUMBER + 1))}
    found |= {*commands.BARE, *commands.ONE_NOUN, *commands.TWO_NOUNS, *commands.TWO_NOUNS.values()}
    return sorted(found | _TEXTS | _TASKS)


_TEXTS = {
    "You are in the middle of a room. Looking quickly around you, you see",
    *("a", ", a", ", and a", ", you see a", ", you see nothing.", "nothing", "nothing.", NOTHING_HAPPENS),
    *("You arrive at", ". On the", ". The", "On the", "The", "is closed.", "is open. In it", "You open the"),
    *("You close the", "You pick up the", "from the", "You move the", "to the", "You turn on the"),
    *("You sliced the", "with the", "You clean the", "You heat the", "You cool the", "using the"),
    *("You are carrying: a", "You are not carrying anything.", "You are facing the", ", and", ","),
    *("Next to it", "This is a normal", ". In it", "This is a", "hot", "cool", "cold", "clean", "sliced"),
    *("and", "is on.", "This", "There's nothing special about"),
}
_TASKS = {
    *("Your task is to:", "put a", "put some", "in", "on", "examine the", "with the", "look at", "under the"),
    *("clean some", "heat some", "cool some", "and put it in", "put two", "find two", "and put them in"),
    *("put a clean", "put a hot", "put a cool"),
}


def _check(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown alfworld {what} {value!r}; the choices are {', '.join(known)}")
