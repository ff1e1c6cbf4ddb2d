"""The processor's time that a run takes: this process and all below it, such as environment workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
FIELDS = slice(13, 17)  # user, system, and both of children that were waited for


def cpu_seconds() -> float:
    """Return the CPU seconds of this process, its threads, and its children and theirs, dead or alive.

    Live children are seen on Linux only; elsewhere they count once they have ended and were waited for.
    """
    ticks = os.sysconf("SC_CLK_TCK")
    return sum(os.times()[:4]) + sum(map(_ticks, _descendants(os.getpid()))) / ticks


def _descendants(pid: int) -> Iterator[int]:
    """List the live processes below one, at any depth; one that ends meanwhile is left out."""
    for path in PROC.glob(f"{pid}/task/*/children"):
        try:
            children = [int(word) for word in path.read_text().split()]
        except OSError:
            continue
        for child in children:
            yield child
            yield from _descendants(child)


def _ticks(pid: int) -> int:
    """Read what a process and its dead children took; 0 where it has just ended."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return 0
    # The second field is the program's name in parentheses, which may hold blanks.
    return sum(map(int, ["", "", *text.rpartition(")")[2].split()][FIELDS]))
