"""Prompts, action parsers, and a closed vocabulary for small models."""

from __future__ import annotations

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
from empg_envs.tags import TagParser
from empg_envs.template import TemplatePrompts
from empg_envs.webshop import assortment as words
from empg_envs.webshop.actions import SEARCH, parse_action
from empg_envs.webshop.pages import SEPARATOR
from empg_envs.webshop.texts import SEARCH_HINT, VERBS

PARSERS = ("plain", "tags")
STYLES = ("terse", "page")
MAX_PROMPT_CHARACTERS = 13_000  # a longer windowed prompt is built without its history
_TAIL_CHARACTERS = 20  # number of last characters of a response without action tags that are the action
_VERBS = (*VERBS, f"{SEARCH} ", "open item ", "pick ")

_ROLE = (
    "You are shopping in an online store that you operate through text. Find a product that fits the "
    "request, choose the options that it names, and buy it: the purchase ends the visit and is scored by how "
    "well the product, its options and its price fit."
)
_ANSWER = {
    "plain": "Answer with one of these actions and nothing else.",
    "tags": (
        "First reason about the page between <think> and </think>. Then write exactly one of these actions "
        "between <action> and </action>."
    ),
}


def make_prompts(style: str = "terse", parser: str = "plain", template: str | None = None) -> PromptBuilder:
    """Build the prompt builder that fits an environment's style.

    Args:
      style: ``terse`` (only the observation) or ``page`` (role, request, page, admissible actions).
      parser: the parser of the answers; the instructions ask for its format.
      template: file with a prompt in place of the style ``page``'s own words; see `empg_envs.template`. The
        actions at hand are ``{available_actions}``.

    Raises:
      ValueError: the style or parser is unknown, ``terse``, which has no instructions, is combined with
        ``tags``, or a template cannot be used.
    """
    _check(style, parser)
    if style == "page":
        usual = PagePrompts(parser)
        if template is None:
            return usual
        show = lambda observation, info: quote_page(observation, info["task"])  # noqa: E731
        return TemplatePrompts(
            template, usual, ("available_actions", quote_actions), show, MAX_PROMPT_CHARACTERS
        )
    if template is not None:
        raise ValueError("a webshop template goes with style 'page', not 'terse'")
    if parser == "tags":
        raise ValueError(
            "webshop style 'terse' gives no instructions, so it needs parser 'plain', not 'tags'"
        )
    return PlainPrompts()


def make_parser(parser: str = "plain", *, style: str = "terse", template: str | None = None) -> ActionParser:
    """Build the action parser; it accepts the options of `make_prompts`.

    Args:
      parser: ``plain`` (the first line) or ``tags`` (think and action tags).
      style: the style whose grammar a valid plain answer follows.
      template: ignored; it only affects the prompts.

    Raises:
      ValueError: the style or parser is unknown.
    """
    _check(style, parser)
    return TagParser(_TAIL_CHARACTERS) if parser == "tags" else LineParser(style)


def _check(style: str, parser: str) -> None:
    if style not in STYLES:
        raise ValueError(f"unknown webshop prompt style {style!r}; the styles are {', '.join(STYLES)}")
    if parser not in PARSERS:
        raise ValueError(f"unknown webshop parser {parser!r}; the parsers are {', '.join(PARSERS)}")


class LineParser:
    """A parser of the first line behind the thought; it is valid if it follows the style's grammar."""

    def __init__(self, style: str) -> None:
        """Set the style, ``terse`` or ``page``."""
        self._style = style

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Return the stripped line; an ill-formed one is returned unchanged as invalid."""
        action = first_line(response)
        if self._style == "page":
            return ParsedAction(action, bool(parse_action(action).name))
        action = " ".join(action.lower().split())
        return ParsedAction(action, action.startswith(_VERBS))


class PagePrompts(PlainPrompts):
    """A prompt builder with the structure of verl-agent's prompts: request, past, page, actions, format."""

    def __init__(self, parser: str = "plain") -> None:
        """Set the parser whose answer format the prompts ask for."""
        self._answer = _ANSWER[parser]

    def start(self, observation: str, info: Mapping[str, Any]) -> list[Message]:
        """Return one user message: role, request, page, actions, answer format."""
        parts = [f"{_ROLE}\nThe request is: {info['task']}", *self._now(observation, info)]
        return [{"role": "user", "content": "\n\n".join(parts)}]

    def follow(self, observation: str, info: Mapping[str, Any]) -> str:
        """Return the page and the actions."""
        return "\n\n".join(self._now(observation, info))

    def recall(
        self,
        history: Sequence[tuple[str, str]],
        observation: str,
        info: Mapping[str, Any],
        turn: int,
    ) -> list[Message]:
        """Return a fresh prompt: role, request, the numbered past turns, and the current page.

        A prompt longer than `MAX_PROMPT_CHARACTERS` is built without past turns.
        """
        past = quote_turns([(quote_page(seen, info["task"]), done) for seen, done in history], turn)
        parts = [f"{_ROLE}\nThe request is: {info['task']}"]
        if past:
            parts.append(f"You have taken {turn} steps. The last {len(history)} pages and actions:\n{past}")
        parts += [f"You are now at step {turn + 1}.", *self._now(observation, info)]
        content = "\n\n".join(parts)
        if len(content) > MAX_PROMPT_CHARACTERS:
            return self.start(observation, info)
        return [{"role": "user", "content": content}]

    def _now(self, observation: str, info: Mapping[str, Any]) -> list[str]:
        return [
            f"The page now: {quote_page(observation, info['task'])}",
            f"Actions that you can take:\n[\n{quote_actions(info)}\n]",
            self._answer,
        ]


def quote_page(observation: str, task: str) -> str:
    """Return the texts of a page after the instruction, each in quotes.

    For a page without the instruction (after the purchase), return all texts.
    """
    segments = observation.split(SEPARATOR)
    if task in segments:
        segments = segments[segments.index(task) + 1 :]
    return SEPARATOR.join(f"'{segment}'" for segment in segments)


def offered_actions(info: Mapping[str, Any]) -> list[str]:
    """Return the actions in the order of the page; with a search bar, the search comes first."""
    search = [SEARCH_HINT] if info.get("has_search") else []
    return [*search, *(f"click[{name}]" for name in info.get("clickables", ()) if name != SEARCH)]


def quote_actions(info: Mapping[str, Any]) -> str:
    """Return the actions at hand, each in quotes and with a comma on a line of its own."""
    return "\n".join(f"'{action}'," for action in offered_actions(info))


def phrases(level: str = "tiny", style: str | None = None, **options: Any) -> list[str]:
    """Return the closed vocabulary of the tiny level in the terse style, for a small tokenizer.

    Args:
      level: the environment's level; only ``tiny`` has a closed vocabulary.
      style: the environment's style; only ``terse`` (the default of ``tiny``) has a closed vocabulary.
      **options: other options of the environment; the vocabulary does not depend on them.

    Returns:
      Sorted phrases without duplicates; some contain spaces.

    Raises:
      ValueError: the level or style has no closed vocabulary.
    """
    if level != "tiny" or style not in (None, "terse"):
        raise ValueError(
            f"webshop level {level!r} in style {style!r} has no closed vocabulary; use level 'tiny' in style "
            "'terse', or a tokenizer"
        )
    limits = (price + 5 for price in words.TINY_PRICES)
    return sorted(
        {
            *words.TINY_KINDS,
            *words.TINY_ATTRIBUTES,
            *words.TINY_COLORS,
            *words.TINY_SIZES,
            *(f"at {price}" for price in words.TINY_PRICES),
            *(f"under {limit}" for limit in limits),
            *(f"item {number}" for number in range(1, 4)),
            *VERBS,
            *("search", "open", "pick", "search page", "want", "nothing", "chosen", "color", "size"),
            *("bought . score", *(f"{hundredth / 100:.2f}" for hundredth in range(101))),
        }
    )
