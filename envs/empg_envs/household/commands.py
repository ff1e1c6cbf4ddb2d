"""The command grammar of ALFWorld 2.1.2: text to command and back."""

from __future__ import annotations

import re
from typing import NamedTuple

BARE = ("look", "inventory", "help")
ONE_NOUN = ("go to", "open", "close", "examine", "use")
# Verb to the preposition between its two nouns.
TWO_NOUNS = {"take": "from", "move": "to", "clean": "with", "heat": "with", "cool": "with", "slice": "with"}

_NOUN = r"([a-z]+ [0-9]+)"
_PATTERN = re.compile(
    "|".join(
        [
            rf"(?P<bare>{'|'.join(BARE)})",
            rf"(?P<one>{'|'.join(ONE_NOUN)}) {_NOUN}",
            *(
                rf"(?P<{verb}>{verb}) {_NOUN} {preposition} {_NOUN}"
                for verb, preposition in TWO_NOUNS.items()
            ),
        ]
    )
)


class Command(NamedTuple):
    """A well-formed command: verb, and up to two nouns in the order in which they are said."""

    verb: str
    first: str = ""
    second: str = ""


def normalize(text: str) -> str:
    """Return lower case, outer blanks removed, runs of blanks made one space."""
    return " ".join(text.lower().split())


def parse(text: str) -> Command | None:
    """Read a command; None when the text is not well formed.

    Well formed means that it follows the grammar; whether anything of that name exists, or the
    command does anything now, is the world's business.
    """
    return parse_exact(normalize(text))


def parse_exact(text: str) -> Command | None:
    """Read a command whose case and blanks are right; None when they are not, or it is not well formed."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        return None
    verb, *nouns = (group for group in match.groups() if group is not None)
    return Command(verb, *nouns)


class Lenient:
    """The household's grammar: case and blanks do not matter, and commands are written as they are."""

    def parse(self, text: str) -> Command | None:
        """Read a command after `normalize`."""
        return parse(text)

    def spell(self, admissible: list[str]) -> list[str]:
        """Return the commands themselves."""
        return admissible
