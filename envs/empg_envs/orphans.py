"""The ends of processes that a worker or a program left behind, also of those in sessions of their own.

A process group does not hold a child that called ``setsid``. All descendants of a process inherit its
environment variables, though, and the worker has a mark of its own among them, as has each program that an
environment starts; so they are found even after it has died. Linux only: elsewhere there is no /proc, and
nothing is found.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

MARK = "EMPG_WORKER"  # the environment variable that marks a worker's descendants
PROGRAM = "EMPG_PROGRAM"  # the one that marks those of a program of one episode
KERNEL = {0, 2}  # parents of the kernel's own threads
LOOKS = 5  # looks at processes that show no variables, as one does while it starts another program
SECONDS = 0.5  # granted to the kernel to end them, and to find those that fork meanwhile


def end_descendants(pid: int | None, mark: str, variable: str = MARK) -> int:
    """Kill all descendants of a process, dead or alive, except this process itself; return their number.

    Args:
      pid: the process. While it lives, its descendants are also found by their parents. None: it has ended,
        and its number may be another process's by now.
      mark: the value of the variable that only this process and its descendants have; empty for none.
      variable: the environment variable.
    """
    needle = f"{variable}={mark}".encode() if mark else b""
    ended: set[int] = set()
    end, looks = time.monotonic() + SECONDS, LOOKS
    while time.monotonic() < end or looks == LOOKS:
        found, is_sure = _find(pid, needle)
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


def _find(pid: int | None, needle: bytes) -> tuple[set[int], bool]:
    """Find the descendants; the second value is False if a process hid whether it is one."""
    is_sure = True
    children: dict[int, list[int]] = {}
    found = set()
    for name in _list_processes():
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{name}/stat", "rb") as stat:
                state, parent = stat.read().rpartition(b")")[2].split()[:2]
            if state == b"Z":
                continue
            children.setdefault(int(parent), []).append(int(name))
            with open(f"/proc/{name}/environ", "rb") as environ:
                variables = environ.read()
            if needle and needle in variables.split(b"\0"):
                found.add(int(name))
            elif not variables and int(parent) not in KERNEL:
                is_sure = False
    waiting = [*found] if pid is None else [pid, *found]
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
