"""Pages for the tool that browses: all passages of a title in the order of the corpus, in bounded pieces."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from empg_envs.deepsearch.ondisk import PassageFile
from empg_envs.deepsearch.passages import Passage

PIECE_MARK = "#"
_WORD = re.compile(r"\S+")
_NUMBERED = re.compile(rf"(.*\S)\s*{PIECE_MARK}\s*([0-9]{{1,6}})", re.DOTALL)


class Pages(Protocol):
    """Pages by title."""

    def read_page(self, title: str) -> Sequence[Passage]:
        """Return the passages of a title in the order of the corpus; none if there is no such title.

        Raises:
          RetrieverError: a server cannot answer.
        """
        ...


class Piece(NamedTuple):
    """A piece of a page: its text, the place in the page where it ends, and how many pieces there are."""

    text: str
    end: int
    total: int


class MemoryPages:
    """The pages of passages in memory; the titles are collected when the first page is read."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        """Keep the passages."""
        self._passages = passages
        self._lock = threading.Lock()

    def read_page(self, title: str) -> Sequence[Passage]:
        """Return the passages of a title; see `Pages`."""
        with self._lock:
            numbers = self._numbers.get(title, ())
        return [self._passages[number] for number in numbers]

    @functools.cached_property
    def _numbers(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number, passage in enumerate(self._passages):
            found.setdefault(passage.title, []).append(number)
        return found


def open_pages(passages: Sequence[Passage]) -> Pages:
    """Return the pages of a corpus in memory or on disk."""
    if not isinstance(passages, PassageFile):
        return MemoryPages(passages)
    from empg_envs.deepsearch.pages_ondisk import DiskPages  # needs NumPy

    return DiskPages(passages)


def read_key(content: str) -> tuple[str, int]:
    """Read what is to be browsed: a title, and the number of a piece behind ``#``; without one it is 1."""
    match = _NUMBERED.fullmatch(content)
    return (content, 1) if match is None else (match[1], int(match[2]))


def write_key(title: str, number: int) -> str:
    """Write what `read_key` reads."""
    return title if number == 1 else f"{title} {PIECE_MARK}{number}"


def cut_piece(text: str, number: int, words: int) -> Piece | None:
    """Return the piece with this number, from 1, of a text in pieces of so many words; None behind the end.

    White space between the words stays as it is. A text without words is one empty piece.
    """
    spans = [match.span() for match in _WORD.finditer(text)]
    total = max(-(-len(spans) // words), 1)
    if not 1 <= number <= total:
        return None
    inside = spans[(number - 1) * words : number * words]
    if not inside:
        return Piece("", len(text), 1)
    return Piece(text[inside[0][0] : inside[-1][1]], inside[-1][1], total)


def first_words(text: str, limit: int | None) -> str:
    """Return the first ``limit`` words of a text with the original white space between them."""
    if limit is None:
        return text
    words = text.split(None, limit)
    if len(words) <= limit:
        return text
    return text[: len(text) - len(words[limit])].rstrip()
