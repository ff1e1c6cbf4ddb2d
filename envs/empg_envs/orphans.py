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
KERNEL = {0, 2}  # parents of the kernel's own threads
LOOKS = 5  # looks at processes that show no variables, as one does while it starts another program
SECONDS = 0.5  # granted to the kernel to end them, and to find those that fork meanwhile


def end_descendants(pid: int, mark: str) -> int:
    """Kill all descendants of a process, dead or alive, except this process itself; return their number.

    Args:
      pid: the process. While it lives, its descendants are also found by their parents.
      mark: the value of `MARK` that only this process and its descendants have; empty for none.
    """
    ended: set[int] = set()
    end, looks = time.monotonic() + SECONDS, LOOKS
    while time.monotonic() < end or looks == LOOKS:
        found, is_sure = _find(pid, mark)
        found -= {os.getpid(), pid}
        looks -= 1
        for number in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(number, signal.SIGKILL)
        if not found and (is_sure or looks <= 0):
            break
        ended |= found
        time.sleep(0.002 if found else 0.01)
    return len(ended)


def _find(pid: int, mark: str) -> tuple[set[int], bool]:
    """Find the descendants; the second value is False if a process hid whether it is one."""
    is_sure = True
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
                variables = environ.read()
            if mark and needle in variables.split(b"\0"):
                found.add(int(name))
            elif not variables and int(parent) not in KERNEL:
                is_sure = False
    waiting = [pid, *found]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            if child not in found:
                found.add(child)
                waiting.append(child)
    return found, is_sure


def _list_processes() -> list[str]:
    try:
        return [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []
