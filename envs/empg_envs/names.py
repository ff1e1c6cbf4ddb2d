"""Lookup of names that a user has typed, with a suggestion for misspelled ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def look_up(kind: str, name: object, table: Mapping[str, T]) -> T:
    """Return the entry of that name.

    Args:
      kind: kind of the entries, such as ``household level``, for the error message.
      name: the name.
      table: the known entries by name.

    Raises:
      ValueError: the name is unknown; the message suggests the nearest one.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    raise ValueError(f"unknown {kind} {name!r}{suggest(name, table)} Known: {', '.join(table)}")


def suggest(name: object, choices: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the nearest choice, or the empty string."""
    nearest = difflib.get_close_matches(str(name), list(choices), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
