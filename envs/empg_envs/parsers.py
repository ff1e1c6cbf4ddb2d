"""Action parsers by name, for environments of every kind (``env.parser``).

A model that thinks begins with ``<think>…</think>`` (some templates write the first tag into the prompt). No
parser looks for the action in there, and a thought without an end has no action.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from empg_envs.base import ActionParser, ParsedAction, PlainParser, PlainPrompts, PromptBuilder, after_thought
from empg_envs.guided import GuidedPrompts
from empg_envs.names import look_up
from empg_envs.tool_calls import parse_calls

# No tag opens inside a pair, so that a mention of the tags in passing does not swallow the action.
_PAIR = re.compile(r"<(action|answer)>((?:(?!<(?:action|answer)>).)*?)</\1>", re.DOTALL)


class WholeParser:
    """A parser that takes all that follows the thought."""

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Return the response without its thought; a blank one is invalid."""
        action = after_thought(response).strip()
        return ParsedAction(action, bool(action))


class LastTagParser:
    """A parser of ``<action>…</action>`` or ``<answer>…</answer>``: the last pair counts.

    Other than `empg_envs.tags.TagParser`, it asks for no thought and leaves the text as it is.
    """

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Return the text between the tags; without a pair, the response without its thought is invalid."""
        said = after_thought(response)
        pairs = list(_PAIR.finditer(said))
        if not pairs:
            return ParsedAction(said.strip(), False)
        action = pairs[-1][2].strip()
        return ParsedAction(action, bool(action))


class JsonParser:
    """A parser of the last JSON object with the key ``action``, as in ``{"action": "go north"}``."""

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Return the text of the key; a value of another type is given as JSON."""
        said = after_thought(response)
        found = [value["action"] for value in _objects(said) if "action" in value]
        if not found:
            return ParsedAction(said.strip(), False)
        action = found[-1] if isinstance(found[-1], str) else json.dumps(found[-1], ensure_ascii=False)
        return ParsedAction(action.strip(), bool(action.strip()))


class CallParser:
    """A parser of a tool call, in the formats of `empg_envs.tool_calls`; the first of several calls counts.

    A call whose only argument is the text ``action`` gives that text. Any other gives
    ``{"name": …, "arguments": {…}}``.
    """

    def __init__(self, *, has_answers: bool = False) -> None:
        """Set whether a response without a call is an answer, and valid; then every call is given as JSON."""
        self._has_answers = has_answers

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Return the call; a response without one is invalid."""
        said = after_thought(response)
        # Where the tools have names only, as a search engine's, the environment itself refuses others.
        tools = [tool for tool in info.get("tools") or () if isinstance(tool, Mapping)]
        names = [tool["function"]["name"] for tool in tools]
        _, calls = parse_calls(said, names or None)
        is_known = not names or (calls and calls[0].name in names)
        # Where the environment takes calls itself, it tells the policy which tools there are.
        if not calls or not (is_known or self._has_answers):
            answer = said.strip()
            return ParsedAction(answer, self._has_answers and bool(answer) and "<tool_call>" not in answer)
        arguments = json.loads(calls[0].arguments)
        if not self._has_answers and list(arguments) == ["action"] and isinstance(arguments["action"], str):
            return ParsedAction(arguments["action"].strip(), True)
        call = {"name": calls[0].name, "arguments": arguments}
        return ParsedAction(json.dumps(call, ensure_ascii=False), True)


class OpenThought:
    """A parser of responses that begin inside a thought, because the prompt ends with its opening tag.

    The parser within reads the response with the tag, so that a thought without an end has no action.
    """

    def __init__(self, parser: ActionParser, *, keeps_ended: bool = False) -> None:
        """Set the parser within, and whether it reads a response that ends its thought as it was sampled."""
        self._parser, self._keeps_ended = parser, keeps_ended

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Parse the response behind the tag."""
        is_kept = self._keeps_ended and "</think>" in response
        has_tag = response.lstrip().startswith("<think>")
        return self._parser(response if is_kept or has_tag else f"<think>{response}", info)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in a text, the outermost of nested ones."""
    decoder, place = json.JSONDecoder(), text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            if isinstance(value, dict):
                yield value
        place = text.find("{", end)


PARSERS: dict[str, Callable[[], ActionParser]] = {
    "line": PlainParser,
    "tags": LastTagParser,
    "json": JsonParser,
    "tool_call": CallParser,
    "whole": WholeParser,
}
# What a prompt says of each format, where the environment brings no prompts of its own.
REQUESTS = {
    "line": "Answer with one action on one line.",
    "tags": "Give your action between <action> and </action>.",
    "json": 'Give your action as JSON: {"action": "..."}',
    "tool_call": (
        "Give your action as a tool call: "
        '<tool_call>{"name": "act", "arguments": {"action": "..."}}</tool_call>'
    ),
    "whole": "Answer with your action and nothing else.",
}


def make_parser(name: str) -> ActionParser:
    """Build a parser by its name.

    Raises:
      ValueError: the name is unknown.
    """
    return look_up("action parser", name, PARSERS)()


def ask_for(name: str, prompts: PromptBuilder) -> PromptBuilder:
    """Make prompts ask for a parser's format, unless their environment has words of its own for that."""
    guided = GuidedPrompts() if type(prompts) is PlainPrompts else prompts
    if not isinstance(guided, GuidedPrompts):
        return prompts
    return guided.asking(REQUESTS[name], is_call=name == "tool_call")
