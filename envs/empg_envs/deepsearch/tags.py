"""The agent's language: a call is a block between tags, such as ``<search>…</search>``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

SEARCH, OPEN, ANSWER = "search", "open", "answer"
TOOLS = (SEARCH, OPEN, ANSWER)

_OPENING = re.compile(rf"<({'|'.join(TOOLS)})>")


class Call(NamedTuple):
    """What the agent asks for: the tool's name and the text between its tags, stripped."""

    tool: str
    content: str

    def __str__(self) -> str:
        return f"<{self.tool}>{self.content}</{self.tool}>"


def iter_blocks(text: str, tools: Collection[str] = TOOLS) -> Iterator[Call]:
    """Complete blocks from left to right, none inside another.

    An opening tag that is never closed is text. The work is linear in the text, however many tags it holds.
    """
    position = 0
    unclosed: set[str] = set()
    for match in _OPENING.finditer(text):
        tool = match.group(1)
        if match.start() < position or tool not in tools or tool in unclosed:
            continue
        end = text.find(f"</{tool}>", match.end())
        if end < 0:
            unclosed.add(tool)
            continue
        yield Call(tool, text[match.end() : end].strip())
        position = end + len(tool) + 3


def read_call(text: str, tools: Collection[str] = TOOLS) -> Call | None:
    """Return the call that a response makes, None when it makes none.

    The first complete block decides what is done. Of several answers in one response the last one counts.
    A block with nothing in it is no call.

    Args:
      text: the response.
      tools: names that are on offer; blocks of other names are text.
    """
    first = next(iter_blocks(text, tools), None)
    if first is not None and first.tool == ANSWER:
        *_, first = iter_blocks(text, (ANSWER,))
    return first if first is not None and first.content else None


def count_openings(text: str, tools: Collection[str] = TOOLS) -> int:
    """How many opening tags of these tools a text holds, closed or not."""
    return sum(match.group(1) in tools for match in _OPENING.finditer(text))


def cut_after_first_close(text: str, tools: Collection[str] = TOOLS) -> str:
    """Return the text up to and including the first closing tag of these tools; all of it without one."""
    match = re.search(rf"</({'|'.join(tools)})>", text)
    return text if match is None else text[: match.end()]
