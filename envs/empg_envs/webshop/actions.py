"""The action grammar: ``search[words]`` and ``click[name]``."""

from __future__ import annotations

from typing import NamedTuple

SEARCH, CLICK = "search", "click"


class Action(NamedTuple):
    """What an action text means; an empty name means nothing."""

    name: str
    argument: str = ""


def parse_action(text: str) -> Action:
    """Read an action as the original does, in time linear in the text.

    Of the first line, the name is what stands before the last ``[`` that some ``]`` follows at a distance,
    the argument what stands between it and the last ``]``, lower-cased; whatever follows is ignored. A name
    other than ``search`` and ``click``, in this very spelling, gives an action without a name.
    """
    line = text.partition("\n")[0]
    end = line.rfind("]")
    start = line.rfind("[", 1, max(end - 1, 1))
    if start < 1:
        return Action("")
    name, argument = line[:start], line[start + 1 : end].lower()
    return Action(name, argument) if name in (SEARCH, CLICK) else Action("")
