"""Tool calls of the agent: blocks between tags, such as ``<search>…</search>``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

SEARCH, OPEN, BROWSE, ANSWER = "search", "open", "browse", "answer"
TOOLS = (SEARCH, OPEN, ANSWER)
TOOL_SETS = ((SEARCH,), (SEARCH, OPEN), (SEARCH, BROWSE))

_OPENING = re.compile(rf"<({'|'.join((*TOOLS, BROWSE))})>")


class Call(NamedTuple):
    """A tool call: the tool's name and the stripped text between its tags."""

    tool: str
    content: str

    def __str__(self) -> str:
        return f"<{self.tool}>{self.content}</{self.tool}>"


def iter_blocks(text: str, tools: Collection[str] = TOOLS) -> Iterator[Call]:
    """Yield the complete blocks from left to right; blocks are not nested.

    An opening tag that is never closed is text. The time is linear in the length of the text.
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
    """Return the call of a response, or None if it has none.

    The call is the first complete block. If that is an answer, the last answer of the response counts. An
    empty block is no call.

    Args:
      text: the response.
      tools: names of the available tools; blocks of other names are text.
    """
    first = next(iter_blocks(text, tools), None)
    if first is not None and first.tool == ANSWER:
        *_, first = iter_blocks(text, (ANSWER,))
    return first if first is not None and first.content else None


def count_openings(text: str, tools: Collection[str] = TOOLS) -> int:
    """Count the opening tags of these tools in a text, closed or not."""
    return sum(match.group(1) in tools for match in _OPENING.finditer(text))


def cut_after_first_close(text: str, tools: Collection[str] = TOOLS) -> str:
    """Return the text up to and including the first closing tag of these tools, or all of the text."""
    match = re.search(rf"</({'|'.join(tools)})>", text)
    return text if match is None else text[: match.end()]


def choose_tools(
    tools: Sequence[str] | None, snippet_words: int | None, piece_words: int | None
) -> tuple[str, ...]:
    """Return the tools on offer.

    Args:
      tools: a set of `TOOL_SETS`; None is search, and open where results are cut.
      snippet_words: number of words of a search result that are shown, or None.
      piece_words: number of words of a browsed piece, or None.

    Raises:
      ValueError: the set is another one, or a limit belongs to a tool that is not in it.
    """
    if tools is None:
        tools = (SEARCH,) if snippet_words is None else (SEARCH, OPEN)
    if tuple(tools) not in TOOL_SETS:
        sets = ", ".join(f"[{', '.join(each)}]" for each in TOOL_SETS)
        raise ValueError(f"deepsearch tools is {tools!r}; expected one of {sets}")
    if OPEN in tools and snippet_words is None:
        raise ValueError(
            "deepsearch tools=[search, open] needs snippet_words: what is whole cannot be opened"
        )
    if tuple(tools) == (SEARCH,) and snippet_words is not None:
        raise ValueError(
            "deepsearch snippet_words needs a tool that reads on: tools=[search, open] or browse"
        )
    if piece_words is not None and BROWSE not in tools:
        raise ValueError("deepsearch piece_words has an effect with tools=[search, browse] only")
    return (*tools, ANSWER)
