"""Lookup of names that a user has typed, with a suggestion for misspelled ones."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

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
    raise ValueError(f"unknown {kind} {name!r}{suggest(name, table) or '.'} Known: {', '.join(table)}")


def suggest(name: object, choices: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the nearest choice, or the empty string."""
    nearest = difflib.get_close_matches(str(name), list(choices), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def import_function(option: str, entry_point: str) -> Callable[..., Any]:
    """Import ``package.module:function``, which may lie in the current folder.

    Raises:
      ValueError: it does not exist; the message names the option.
    """
    module, _, name = entry_point.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{option}={entry_point}: {error}; expected package.module:function") from None
    if not callable(found):
        raise ValueError(f"{option}={entry_point} is a {type(found).__name__}; expected a function")
    return found
