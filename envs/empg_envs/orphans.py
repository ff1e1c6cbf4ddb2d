"""The ends of processes that an environment left behind, also of those in sessions of their own.

A process group does not hold a child that called ``setsid``. All descendants of a worker inherit its
environment variables, though, and the worker has a mark of its own among them; so they are found even after
the worker has died. Linux only: elsewhere there is no /proc, and nothing is found.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

MARK = "EMPG_WORKER"  # the environment variable that marks a worker's descendants
SECONDS = 0.5  # granted to the kernel to end them, and to find those that fork meanwhile


def end_descendants(pid: int, mark: str) -> int:
    """Kill all descendants of a process, dead or alive, except this process itself; return their number.

    Args:
      pid: the process. While it lives, its descendants are also found by their parents.
      mark: the value of `MARK` that only this process and its descendants have; empty for none.
    """
    ended: set[int] = set()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        found = _find(pid, mark) - {os.getpid(), pid}
        for number in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(number, signal.SIGKILL)
        if not found:
            break
        ended |= found
        time.sleep(0.002)
    return len(ended)


def _find(pid: int, mark: str) -> set[int]:
    children: dict[int, list[int]] = {}
    found = set()
    needle = f"{MARK}={mark}".encode()
    for name in _list_processes():
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{name}/stat", "rb") as stat:
                state, parent = stat.read().rpartition(b")")[2].split()[:2]
            if state == b"Z":
                continue
            children.setdefault(int(parent), []).append(int(name))
            with open(f"/proc/{name}/environ", "rb") as environ:
                if mark and needle in environ.read().split(b"\0"):
                    found.add(int(name))
    waiting = [pid, *found]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            if child not in found:
                found.add(child)
                waiting.append(child)
    return found


def _list_processes() -> list[str]:
    try:
        return [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []
