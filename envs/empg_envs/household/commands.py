"""The command grammar of ALFWorld 2.1.2."""

from __future__ import annotations

import re
from typing import NamedTuple

BARE = ("look", "inventory", "help")
ONE_NOUN = ("go to", "open", "close", "examine", "use")
# Verb -> the preposition between its two nouns.
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
    """A well-formed command: a verb and up to two nouns in their order in the text."""

    verb: str
    first: str = ""
    second: str = ""


def normalize(text: str) -> str:
    """Convert to lower case, strip outer blanks, and collapse runs of blanks to one space."""
    return " ".join(text.lower().split())


def parse(text: str) -> Command | None:
    """Parse a command; return None if the text is not well formed.

    Only the grammar is checked here. Whether the named objects exist and whether the command has an effect
    depends on the world.
    """
    return parse_exact(normalize(text))


def parse_exact(text: str) -> Command | None:
    """Parse a command with exact case and blanks; return None if the text is not well formed."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        return None
    verb, *nouns = (group for group in match.groups() if group is not None)
    return Command(verb, *nouns)


class Lenient:
    """The household's grammar: case and blanks do not matter, and commands have their canonical spelling."""

    def parse(self, text: str) -> Command | None:
        """Parse a command after `normalize`."""
        return parse(text)

    def spell(self, admissible: list[str]) -> list[str]:
        """Return the commands unchanged."""
        return admissible
