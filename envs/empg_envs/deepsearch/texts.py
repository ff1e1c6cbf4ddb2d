"""Texts of questions and results in two styles: few words for small models, or Search-R1's format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from empg_envs.deepsearch.pages import PIECE_MARK, Piece
from empg_envs.deepsearch.passages import Passage
from empg_envs.deepsearch.tables import BOOK, CITY, COMPANY, KIND_OF_VALUE, PERSON
from empg_envs.deepsearch.tags import BROWSE, OPEN

# A shown search result: the passage, and the shown part of its text.
Shown = tuple[Passage, str]


class Texts(Protocol):
    """A style: all texts of the environment."""

    def opening(self, question: str) -> str:
        """Return the first observation."""
        ...

    def results(self, question: str, found: Sequence[Shown], reader: str | None) -> str:
        """Return the text of search results, with what ``reader`` names, the tool that reads more of them."""
        ...

    def page(self, question: str, passage: Passage) -> str:
        """Return the text of an opened passage."""
        ...

    def piece(self, question: str, title: str, number: int, piece: Piece) -> str:
        """Return the text of a piece of a page that was browsed."""
        ...

    def notice(self, question: str, kind: str) -> str:
        """Return the message for a failed call.

        Args:
          question: the question.
          kind: ``invalid``, ``unknown_id``, ``unknown_title``, ``no_piece`` or ``budget``.
        """
        ...

    def ask(self, start: str, relations: Sequence[str]) -> str:
        """Return the question about an embedded world."""
        ...

    def describe(self, name: str, facts: Mapping[str, str]) -> Passage:
        """Return a passage of an embedded world, without its id."""
        ...

    def fact(self, name: str, relation: str, value: str) -> str:
        """Return the exact words that `describe` writes for one fact."""
        ...

    def name(self, name: str) -> str:
        """Return a name in the style's spelling."""
        ...


class TerseTexts:
    """A style with few words of a closed vocabulary. Every observation ends with the question."""

    _NOTICES: Mapping[str, str] = {
        "invalid": "invalid .",
        "unknown_id": "nothing .",
        "unknown_title": "nothing .",
        "no_piece": "nothing .",
        "budget": "no more .",
    }

    def opening(self, question: str) -> str:
        """Return the question."""
        return f"question : {question}"

    def results(self, question: str, found: Sequence[Shown], reader: str | None) -> str:
        """Return the passages one after the other, or ``nothing .``."""
        named = {OPEN: lambda passage: f"{passage.id} : ", BROWSE: lambda passage: f"{passage.title} : "}
        name = named.get(reader or "", lambda passage: "")
        lines = [f"{name(passage)}{text}" for passage, text in found]
        return f"{' '.join(lines) or 'nothing .'} {self.opening(question)}"

    def page(self, question: str, passage: Passage) -> str:
        """Return the passage."""
        return f"{passage.text} {self.opening(question)}"

    def piece(self, question: str, title: str, number: int, piece: Piece) -> str:
        """Return the piece, with the number of the next one if there is one: ``mother dana #2``."""
        following = f" {PIECE_MARK}{number + 1}" if number < piece.total else ""
        return f"{piece.text}{following} {self.opening(question)}"

    def notice(self, question: str, kind: str) -> str:
        """Return a message of two words."""
        return f"{self._NOTICES[kind]} {self.opening(question)}"

    def ask(self, start: str, relations: Sequence[str]) -> str:
        """Return the relations from the last to the first, then the start: ``mother of founder of acme``."""
        return " of ".join([*reversed(relations), start])

    def describe(self, name: str, facts: Mapping[str, str]) -> Passage:
        """Return ``acme : founder dana fox , seat oslo .``"""
        told = " , ".join(self.fact(name, relation, value) for relation, value in facts.items())
        return Passage("", name, f"{name} : {told} .")

    def fact(self, name: str, relation: str, value: str) -> str:
        """Return ``founder dana fox``."""
        return f"{relation} {value}"

    def name(self, name: str) -> str:
        """Return the name unchanged."""
        return name


class SearchR1Texts:
    """A style with whole sentences and with Search-R1's format of results."""

    _NOTICES: Mapping[str, str] = {
        "invalid": (
            "That was not an action. To look something up, write what you look for between <search> and "
            "</search>. To finish, write your answer between <answer> and </answer>."
        ),
        "unknown_id": "No result so far has that id, so there is nothing to open.",
        "unknown_title": "No result so far has that title, so there is no page to browse.",
        "no_piece": "That page has no piece of that number.",
        "budget": "All tool calls for this question are used up. Answer between <answer> and </answer>.",
    }
    _ASKING: Mapping[str, str] = {
        PERSON: "Who is",
        COMPANY: "Which company is",
        CITY: "Which city is",
        BOOK: "Which book is",
    }

    def opening(self, question: str) -> str:
        """Return the question."""
        return question

    def results(self, question: str, found: Sequence[Shown], reader: str | None) -> str:
        """Return numbered passages between information tags.

        Titles stand as on the first line of ``contents``, with wiki-18's quotes, as in Search-R1. With a
        ``reader``, which Search-R1 has not, they stand without, as ``<browse>`` takes them.
        """
        lines = []
        for number, (passage, text) in enumerate(found, start=1):
            title = passage.title if reader else passage.contents.partition("\n")[0]
            name = f"Id: {passage.id}, " if reader == OPEN else ""
            lines.append(f"Doc {number}({name}Title: {title}) {text}\n")
        return _wrap("".join(lines) or "Nothing was found.")

    def page(self, question: str, passage: Passage) -> str:
        """Return the whole passage between information tags."""
        return _wrap(f"(Id: {passage.id}, Title: {passage.title}) {passage.text}")

    def piece(self, question: str, title: str, number: int, piece: Piece) -> str:
        """Return the piece between information tags, with its number and how many there are."""
        return _wrap(f"(Title: {title}, piece {number} of {piece.total}) {piece.text}")

    def notice(self, question: str, kind: str) -> str:
        """Return a sentence with a hint at valid calls."""
        return f"\n{self._NOTICES[kind]}\n"

    def ask(self, start: str, relations: Sequence[str]) -> str:
        """Return ``Who is the mother of the founder of Acme?``"""
        links = " of ".join(f"the {relation}" for relation in reversed(relations))
        return f"{self._ASKING[KIND_OF_VALUE[relations[-1]]]} {links} of {self.name(start)}?"

    def describe(self, name: str, facts: Mapping[str, str]) -> Passage:
        """Return a sentence for each fact."""
        sentences = [self.fact(name, relation, value) for relation, value in facts.items()]
        return Passage("", self.name(name), " ".join(sentences), is_quoted=False)

    def fact(self, name: str, relation: str, value: str) -> str:
        """Return ``The founder of Acme is Dana Fox.``"""
        return f"The {relation} of {self.name(name)} is {self.name(value)}."

    def name(self, name: str) -> str:
        """Return the name with capital letters."""
        return name.title()


TEXTS: dict[str, Callable[[], Texts]] = {"terse": TerseTexts, "search_r1": SearchR1Texts}


def _wrap(text: str) -> str:
    return f"\n\n<information>{text.strip()}</information>\n\n"
