"""The console of all commands."""

from __future__ import annotations

from typing import Any

from rich.console import Console


def make_console(**options: Any) -> Console:
    """Return a console that shows texts as they are: no colored numbers, no pictures for ``:names:``."""
    return Console(highlight=False, emoji=False, **options)
