"""Looking things up by a name that a person has typed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def look_up(kind: str, name: object, table: Mapping[str, T]) -> T:
    """Return the entry of that name.

    Args:
      kind: what the table holds, for the message, such as ``household level``.
      name: the name.
      table: what there is.

    Raises:
      ValueError: there is none of that name; the nearest known one is named.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    raise ValueError(f"unknown {kind} {name!r}{suggest(name, table)} Known: {', '.join(table)}")


def suggest(name: object, choices: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the nearest choice, or nothing."""
    nearest = difflib.get_close_matches(str(name), list(choices), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
