"""The action grammar: ``search[words]`` and ``click[name]``."""

from __future__ import annotations

from typing import NamedTuple

SEARCH, CLICK = "search", "click"


class Action(NamedTuple):
    """A parsed action; an empty name stands for an action without effect."""

    name: str
    argument: str = ""


def parse_action(text: str) -> Action:
    """Parse an action by the original's rule, in time linear in the text.

    Only the first line counts. Its last ``[`` that has a ``]`` at least two characters later ends the name.
    The argument is the lower-cased text between this ``[`` and the last ``]``. The rest is ignored. A name
    other than exactly ``search`` or ``click`` gives an action without a name.
    """
    line = text.partition("\n")[0]
    end = line.rfind("]")
    start = line.rfind("[", 1, max(end - 1, 1))
    if start < 1:
        return Action("")
    name, argument = line[:start], line[start + 1 : end].lower()
    return Action(name, argument) if name in (SEARCH, CLICK) else Action("")
