"""Written conversations from JSON-lines files, in the common formats.

A line is an object with ``messages`` (``[{"role", "content"}, ...]``, and optionally ``tools``),
``conversations`` (``[{"from", "value"}, ...]``), or ``prompt`` and ``completion`` (two texts, or two lists of
messages). A text under ``system`` beside them is a first message. A line in another format raises an error
that names the problem; nothing is guessed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from empg_jax.errors import UserError
from empg_jax.text.template import Message

ROLES = ("system", "developer", "user", "assistant", "tool")
_SENDERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class ChatDataError(UserError, ValueError):
    """An unusable conversation file or line. The message gives the cause; the caller adds file and line."""


@dataclasses.dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, with a flag for those that are trained on.

    Attributes:
      messages: messages in the format of chat templates.
      is_trained: one flag per message; only an assistant's message can be True.
      tools: tool definitions for the template, or None.
    """

    messages: tuple[Message, ...]
    is_trained: tuple[bool, ...]
    tools: Sequence[Any] | None = None


def read_chat_file(path: Path) -> Iterator[tuple[int, Conversation | ChatDataError]]:
    """Yield the number and the conversation of every line, or the error of an unusable line.

    Blank lines are skipped.

    Raises:
      ChatDataError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield number, parse_conversation(_load_json(line))
                except ChatDataError as problem:
                    yield number, problem
    except OSError as error:
        raise ChatDataError(f"cannot read {path}: {error.strerror}") from None


def parse_conversation(record: Any) -> Conversation:
    """Parse the conversation of one line.

    Args:
      record: the decoded JSON of the line.

    Raises:
      ChatDataError: the record is no conversation; the message gives the reason.
    """
    if not isinstance(record, dict):
        raise ChatDataError(f"is a JSON {type(record).__name__}, not an object with messages")
    learned_from = 0  # index of the first message that may be trained on
    if "messages" in record:
        messages = _messages(record["messages"], "messages")
    elif "conversations" in record:
        messages = _messages(_translate(record["conversations"]), "conversations")
    elif "prompt" in record and "completion" in record:
        prompt = _messages(_as_messages(record["prompt"], "user"), "prompt")
        learned_from = len(prompt)  # train on the completion only
        messages = (*prompt, *_messages(_as_messages(record["completion"], "assistant"), "completion"))
    else:
        raise ChatDataError(
            "has neither messages nor conversations nor prompt and completion; its keys are "
            f"{', '.join(map(str, record)) or 'none'}"
        )
    if record.get("system"):
        first = messages[0]["role"]
        if first in ("system", "developer"):
            raise ChatDataError(f"has a text under system and a first message of the role {first}: keep one")
        messages = (_message({"role": "system", "content": record["system"]}, "system"), *messages)
        learned_from += 1
    tools = record.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise ChatDataError(f"tools is a {type(tools).__name__}, not a list")
    return Conversation(*_mark(messages, learned_from), tools or None)


def _mark(messages: Sequence[Message], learned_from: int) -> tuple[tuple[Message, ...], tuple[bool, ...]]:
    """Return the messages and their training flags; an assistant's ``weight`` of 0 excludes the message."""
    if messages[0]["role"] == "assistant":
        raise ChatDataError("begins with the assistant: there is no prompt to answer")
    is_trained = tuple(
        message["role"] == "assistant" and index >= learned_from and message.get("weight", 1) != 0
        for index, message in enumerate(messages)
    )
    if not any(is_trained):
        raise ChatDataError("has no message of the assistant to learn from")
    bare = tuple({key: value for key, value in m.items() if key != "weight"} for m in messages)
    return bare, is_trained


def _messages(value: Any, key: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise ChatDataError(f"{key} is no list of messages, or an empty one")
    return tuple(_message(item, f"{key}[{index}]") for index, item in enumerate(value))


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ChatDataError(f"{where} is a {type(item).__name__}, not an object")
    role = item.get("role")
    if role not in ROLES:
        raise ChatDataError(f"{where} has the role {role!r}; roles are {', '.join(ROLES)}")
    content = item.get("content")
    if content is None and item.get("tool_calls"):
        content = ""
    if isinstance(content, list):  # parts, as multimodal APIs write them
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise ChatDataError(f"{where} has a content that is no text but {type(content).__name__}")
    reasoning = item.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise ChatDataError(f"{where} has a reasoning_content that is no text but {type(reasoning).__name__}")
    # Tables of messages have every key in every row; to a template, a key that is there is no empty one.
    filled = {key: value for key, value in item.items() if value is not None and value != []}
    message = {**filled, "content": content}
    if item.get("tool_calls"):
        message["tool_calls"] = _calls(item["tool_calls"], f"{where}.tool_calls")
    try:
        json.dumps(message, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ChatDataError(f"{where} holds half of a surrogate pair, which is no character") from None
    return message


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise ChatDataError(f"{where} is a {type(value).__name__}, not a list of calls")
    return [_call(call, f"{where}[{index}]") for index, call in enumerate(value)]


def _call(call: Any, where: str) -> dict[str, Any]:
    """Return a call with its arguments as an object: templates print them as JSON themselves."""
    if not isinstance(call, dict):
        raise ChatDataError(f"{where} is a {type(call).__name__}, not an object")
    if "function" in call:
        return {**call, "function": _call(call["function"], f"{where}.function")}
    if "arguments" not in call:
        return call
    arguments = call["arguments"]
    if arguments is None or arguments == "":  # a call without arguments
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise ChatDataError(f"{where}.arguments is not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ChatDataError(f"{where}.arguments is a {type(arguments).__name__}, not an object")
    return {**call, "arguments": arguments}


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise ChatDataError(f"{where} has a part of type {kind!r}; only text can be learned")


def _translate(turns: Any) -> Any:
    """Convert ShareGPT's ``from`` and ``value`` to ``role`` and ``content``; keep all else unchanged."""
    if not isinstance(turns, list):
        return turns
    return [_translate_turn(turn) for turn in turns]


def _translate_turn(turn: Any) -> Any:
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
        return turn
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {**rest, "role": _SENDERS.get(turn["from"], turn["from"]), "content": turn.get("value")}


def _as_messages(value: Any, role: str) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _load_json(line: bytes) -> Mapping[str, Any]:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ChatDataError(f"is not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        if line.lstrip().startswith(b"["):
            raise ChatDataError(
                "opens a JSON array that goes on over lines; every line must hold one conversation "
                "(jq -c '.[]' FILE writes that)"
            ) from None
        raise ChatDataError(f"is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise ChatDataError(f"is not JSON that can be read: {error}") from None
