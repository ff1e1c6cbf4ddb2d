"""Tool calls in a response's text: the formats of Qwen and Hermes (``<tool_call>``) and of Llama (bare JSON).

The model writes calls as text. Clients of the OpenAI wire read them as objects, and send those objects back.
`parse_response` makes the objects; `normalize_messages` turns messages of the wire into what a chat template
reads.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from empg_envs.base import after_thought

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_SPACE = re.compile(r"\s*")
_PYTHON_TAG = "<|python_tag|>"

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCall:
    """One call: the tool's name and its arguments as JSON text."""

    name: str
    arguments: str


def parse_calls(text: str, names: Collection[str] | None) -> tuple[str, list[ToolCall]]:
    """Split a response into the text before its tool calls, and the calls; no call lies in a thought.

    Args:
      text: the response.
      names: the tools of the request. Bare JSON that names another one is an answer, not a call. None: any
        name is a tool's.

    Returns:
      The whole text and no calls, where there are none or one of them is malformed.
    """
    said = after_thought(text)
    thought = text.removesuffix(said)
    try:
        if _OPEN in said:
            return (thought + said.partition(_OPEN)[0]).strip(), _read_tagged(said)
        return thought.strip(), _read_bare(said.strip().removeprefix(_PYTHON_TAG), names)
    except (ValueError, RecursionError):
        return text, []


def _read_tagged(said: str) -> list[ToolCall]:
    calls, start = [], said.find(_OPEN)
    while start >= 0:
        call, end = _read_call(said, start + len(_OPEN), None)
        if end < len(said) and not said.startswith(_CLOSE, end):
            raise ValueError(f"{_CLOSE} is missing")
        calls.append(call)
        start = said.find(_OPEN, end)
    return calls


def _read_bare(said: str, names: Collection[str] | None) -> list[ToolCall]:
    call, end = _read_call(said, 0, names)
    calls = [call]
    while said.startswith(";", end):  # Llama separates several calls by semicolons
        call, end = _read_call(said, end + 1, names)
        calls.append(call)
    if end < len(said):
        raise ValueError("text behind the calls")
    return calls


def _read_call(said: str, start: int, names: Collection[str] | None) -> tuple[ToolCall, int]:
    """Read the call at a place; return it and the place behind it and the white space that follows."""
    value, end = json.JSONDecoder().raw_decode(said, _skip_space(said, start))
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("no name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, dict) or (names is not None and value["name"] not in names):
        raise ValueError("no arguments, or another tool's")
    # Python reads and writes NaN and infinities, which JSON does not have.
    written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return ToolCall(value["name"], written), _skip_space(said, end)


def _skip_space(said: str, start: int) -> int:
    found = _SPACE.match(said, start)
    assert found is not None  # it matches everywhere
    return found.end()


def parse_response(text: str, tools: Sequence[Mapping[str, Any]], make_id: Callable[[int], str]) -> Message:
    """Make the assistant's message of the OpenAI wire.

    Args:
      text: the response without control tokens.
      tools: the tools of the request, as `check_tools` accepts them; without any, the text is the content.
      make_id: the identity of call ``i``.
    """
    names = [tool["function"]["name"] for tool in tools]
    content, calls = parse_calls(text, names) if names else (text, [])
    if not calls:
        return {"role": "assistant", "content": content}
    described = [
        {
            "id": make_id(i),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for i, call in enumerate(calls)
    ]
    return {"role": "assistant", "content": content or None, "tool_calls": described}


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """Check the tools of a request.

    Raises:
      ValueError: they are no list of functions with names.
    """
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise ValueError("tools must be a list of functions")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'tools[{i}] must be {{"type": "function", "function": {{"name": ...}}}}')
    return tools


def declares_tools(info: Mapping[str, Any]) -> bool:
    """Return whether an environment's info declares functions: ``tools`` that are no bare names."""
    tools = info.get("tools")
    has_names = isinstance(tools, (list, tuple)) and tools and isinstance(tools[0], str)
    return tools is not None and not has_names


def describe_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """Tell tools in words, and how to call one: for a prompt whose chat template has no place for them.

    Args:
      tools: functions, as `check_tools` accepts them.
    """
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    call = f'{_OPEN}{{"name": ..., "arguments": {{...}}}}{_CLOSE}'
    return f"You have these tools, one in a line:\n{lines}\n\nCall one with {call}."


def normalize_messages(messages: Any) -> list[Message]:
    """Check the messages of a request, and make them what a chat template reads.

    Contents become text (an absent one is empty, text parts are joined), and the arguments of tool calls
    become objects, because templates print them as JSON themselves.

    Raises:
      ValueError: a message is malformed; the message names its place.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of at least one message")
    return [_normalize(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _normalize(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f'{where} must be an object with a "role"')
    found: Message = {"role": message["role"], "content": _text_of(message.get("content"), where)}
    for key in ("name", "tool_call_id", "reasoning_content"):
        if isinstance(message.get(key), str):
            found[key] = message[key]
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, list):
            raise ValueError(f"{where}.tool_calls must be a list")
        found["tool_calls"] = [
            _normalize_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    return found


def _text_of(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    raise ValueError(f"{where}.content must be text, or a list of text parts")


def _normalize_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f'{where} must have a "function" with a "name"')
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise ValueError(f"{where}.function.arguments is not JSON") from None
    return {
        "id": str(call.get("id", "")),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
