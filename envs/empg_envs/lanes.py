"""The lanes of a worker: a slow command does not hold up those of other episodes.

Quick commands run one after another in one thread, the *leader*, which also reads them; they pay no switch
of threads. A watch looks at the leader every `TICK`. When the leader waits (for a server, a subprocess, a
timer) in one command for a few ticks, another thread becomes the leader and goes on with the next command;
the first one only finishes its own. As long as commands turn out slow, the lead is handed on before each.

Commands of one episode slot (handle) run in their order, one at a time. A command that computes is not a
waiting one: Python runs one thread at a time, so handing on the lead would only stretch every command. The
parent is told of each command that runs beside others: ``{"running": ID, "thread": NUMBER}``. Of all the
others at most one runs at a time, the first in their order. So the parent knows at any moment, even after
this process has died, which commands were running.
"""

from __future__ import annotations

import collections
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

TICK = 0.002  # seconds between two looks at the leader
IDLE_TICKS = 500  # without any command, after which the watch sleeps until the next one
WAIT_TICKS = 3  # in a row, in which the leader must wait; one may have been the machine's fault
SAMPLE_SECONDS = 0.025  # between two measurements of whether the lanes compute

Command = dict[str, Any]


class Lanes:
    """The threads of a worker. They stay to the end: a child process may die with the thread that made it."""

    def __init__(
        self,
        execute: Callable[[Command], bytes],
        commands: Iterator[Command],
        write: Callable[[bytes], None],
        limit: int,
    ):
        """Prepare the lanes; `serve` runs them.

        Args:
          execute: runs one command and returns the encoded reply; called by several threads.
          commands: the commands in their order.
          write: writes one line; never called by two threads at once.
          limit: largest number of commands that run at the same time.
        """
        self._execute, self._commands, self._write, self._limit = execute, commands, write, limit
        self._lock = threading.Lock()
        self._lead = threading.Semaphore(0)  # released once for each thread that becomes the leader
        self._waiting: dict[Any, collections.deque[Command]] = {}  # by handle, behind a command in a thread
        self._current: Command | None = None  # the leader's command, unless it runs in a lane
        self._leader = threading.current_thread()
        self._idle, self._threads = 0, 1
        self._is_slow = self._is_over = False
        self._awake = threading.Event()

    def serve(self) -> None:
        """Execute commands until there are no more."""
        self._awake.set()
        threading.Thread(target=self._watch, daemon=True, name="watch").start()
        self._lead_until_deposed()
        self._follow()

    def _follow(self) -> None:
        """Wait for the lead, again and again, until the commands end."""
        while True:
            with self._lock:
                if self._is_over:
                    return
                self._idle += 1
            self._lead.acquire()
            if self._is_over:
                return
            self._lead_until_deposed()

    def _lead_until_deposed(self) -> None:
        """Read and execute commands until another thread has the lead and this one's command is done."""
        for command in self._commands:
            with self._lock:
                if command.get("env") in self._waiting:
                    self._waiting[command.get("env")].append(command)
                    continue
                is_lane = self._is_slow and self._promote()
                if is_lane:
                    self._note(command, threading.get_ident())
                else:
                    self._current = command
                    self._leader = threading.current_thread()
            if not self._awake.is_set():
                self._awake.set()
            if is_lane:
                self._finish_lane(command)
                return
            line = self._execute(command)
            with self._lock:
                if self._current is command:
                    self._current = None
                    self._write(line)
                    continue
            self._finish_lane(command, line)
            return
        with self._lock:
            self._is_over = True
            self._lead.release(self._threads)

    def _finish_lane(self, command: Command, line: bytes | None = None) -> None:
        """Run a noted command, or only write its reply, and then the commands that wait behind it."""
        while True:
            if line is None:
                begun = time.monotonic()
                line = self._execute(command)
                if time.monotonic() - begun < TICK:
                    self._is_slow = False
            with self._lock:
                self._write(line)
                handle = command.get("env")
                if not self._waiting[handle]:
                    del self._waiting[handle]
                    return
                command, line = self._waiting[handle].popleft(), None
                self._note(command, threading.get_ident())

    def _note(self, command: Command, thread: int | None) -> None:
        """Tell the parent that a command runs beside others."""
        self._waiting.setdefault(command.get("env"), collections.deque())
        self._write(json.dumps({"running": command["id"], "thread": thread}).encode() + b"\n")

    def _promote(self) -> bool:
        """Make another thread the leader; return False if all are taken."""
        if self._idle:
            self._idle -= 1
        elif self._threads < self._limit:
            self._threads += 1
            threading.Thread(target=self._join, daemon=True, name=f"lane {self._threads}").start()
        else:
            return False
        self._lead.release()
        return True

    def _join(self) -> None:
        """Run a further thread, which has been promoted already."""
        self._lead.acquire()
        if not self._is_over:
            self._lead_until_deposed()
            self._follow()

    def _watch(self) -> None:
        """Depose a leader that waits in the same command from one tick to the next."""
        last, quiet, waits = None, 0, 0
        leader, lanes = _Work(), _Work()
        while not self._is_over:
            time.sleep(TICK)
            command = self._current
            if command is None or command is not last:
                leader.reset()
                waits = 0
            else:
                waits = waits + 1 if leader.measure(0.0) < 0.5 else 0
                if waits >= WAIT_TICKS:
                    self._depose(command)
            if not self._is_slow:
                lanes.reset()
            elif lanes.measure(SAMPLE_SECONDS) > 0.5:
                self._is_slow = False  # they compute: beside each other all of them only take longer
            last, quiet = command, quiet + 1 if command is None else 0
            if quiet > IDLE_TICKS:
                self._awake.clear()
                if self._current is None:
                    self._awake.wait()
                quiet = 0

    def _depose(self, command: Command) -> None:
        with self._lock:
            if self._current is command and self._promote():
                self._note(command, self._leader.ident)
                self._current, self._is_slow = None, True


class _Work:
    """A measure of how much this process computes, also on a machine that has no processor to spare.

    Only one thread at a time runs Python. So the time that this process has computed, and the time in which
    threads only lacked a processor, tell how much of the time it was busy.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the last measurement."""
        self._before: tuple[float, float] | None = None

    def measure(self, seconds: float) -> float:
        """Return the busy share since the last measurement; NaN before so many seconds are over."""
        now = time.monotonic()
        if self._before is not None and now - self._before[0] < seconds:
            return math.nan
        work = time.process_time() + sum(_delay(thread.native_id) for thread in threading.enumerate())
        before, self._before = self._before, (now, work)
        return math.nan if before is None else (work - before[1]) / (now - before[0])


def _delay(thread: int | None) -> float:
    """Return the seconds that a thread has waited for a processor."""
    try:
        with open(f"/proc/self/task/{thread}/schedstat", "rb") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):  # not Linux, or a kernel without this file
        return 0.0
