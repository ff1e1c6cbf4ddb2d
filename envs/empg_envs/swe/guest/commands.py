"""Commands inside a sandbox: run, bounded, watched, and ended with all that they started."""

from __future__ import annotations

# The module behind `signal`: that one makes enumerations of its numbers, which takes a third of the start.
import _signal as signal  # type: ignore[import-not-found]
import os
import resource
import select
import time

TYPE_CHECKING = False  # importing typing would take half of the start
if TYPE_CHECKING:
    from typing import Any

    Config = dict[str, Any]  # limits and folders; see empg_envs.swe.caged

REPORT_FD = 3  # a command that was asked for a report writes it there
LOOK_EVERY = 0.02  # seconds between two looks at what a running command uses
CHUNK = 1 << 16


class Capture:
    """The beginning and the end of a stream that may be endless."""

    def __init__(self, keep: int) -> None:
        """Keep ``keep`` bytes, half of them from the end."""
        self._half = keep // 2
        self._head, self._tail, self.total = bytearray(), bytearray(), 0

    def add(self, data: bytes) -> None:
        """Take the next piece."""
        self.total += len(data)
        room = self._half - len(self._head)
        self._head += data[:room]
        self._tail += data[max(room, 0) :]
        if len(self._tail) > 2 * self._half + CHUNK:
            del self._tail[: -self._half]

    def parts(self) -> tuple[bytes, bytes, int]:
        """Return head, tail and the number of bytes left out between them."""
        tail = bytes(self._tail[-self._half :]) if self._half else b""
        return bytes(self._head), tail, self.total - len(self._head) - len(tail)


class Usage:
    """What all processes of the namespace use together; PID 1 itself is left out."""

    def __init__(self, config: Config) -> None:
        """Take the limits from the sandbox's configuration."""
        self._config = config
        self._page = resource.getpagesize()
        # A command that finds too many files may still remove some.
        self._most = [max(config["files"], _count_files(folder)) for folder in config["scratch"]]

    def excess(self) -> bytes | None:
        """Return the name of a limit that is passed, or None."""
        if not self._config["namespace"]:
            return None
        pids = [name for name in os.listdir("/proc") if name.isdigit() and name != "1"]
        if len(pids) > self._config["processes"]:
            return b"processes"
        pages = 0
        for pid in pids:
            try:
                with open(f"/proc/{pid}/statm", "rb") as statm:
                    pages += int(statm.read().split()[1])
            except (OSError, IndexError):
                continue
        if pages * self._page > self._config["memory"]:
            return b"memory"
        for folder, most in zip(self._config["scratch"], self._most, strict=True):
            if _count_files(folder) > most:
                return b"files"
        return None


def _count_files(folder: str) -> int:
    """Return files and folders in the file system that a folder is the root of."""
    room = os.statvfs(folder)
    return room.f_files - room.f_ffree


def run(
    config: Config,
    argv: list[str],
    environment: dict[str, str],
    cwd: str,
    stdin: bytes,
    seconds: float,
    keep: int,
    report_keep: int,
) -> list[bytes]:
    """Run one command to its end or limit, then end everything it left behind.

    Returns:
      Fields: why it ended (``exit`` or the name of a limit), return code, head, tail and omitted count of
      its output, and what it wrote to the report descriptor.
    """
    out, out_end = os.pipe()
    report, report_end = os.pipe()
    given, given_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        _become(config, argv, environment, cwd, (given, out_end, report_end), seconds)
    for number in (out_end, report_end, given):
        os.close(number)
    captured, reported = Capture(keep), Capture(2 * report_keep)
    exited = os.pidfd_open(pid)
    try:
        reason = _watch(config, exited, {out: captured, report: reported}, given_end, stdin, seconds)
        code = _end(config, pid)
        for number, capture in ((out, captured), (report, reported)):
            _drain(number, capture)
    finally:
        for number in (out, report, exited):
            os.close(number)
    head, tail, omitted = captured.parts()
    said = reported.parts()[0]
    return [reason, b"%d" % code, head, tail, b"%d" % omitted, said]


def _become(
    config: Config,
    argv: list[str],
    environment: dict[str, str],
    cwd: str,
    ends: tuple[int, int, int],
    seconds: float,
) -> None:
    """Turn the forked child into the command; never returns."""
    try:
        os.setsid()
        # The channel took 3 and 4, so no pipe's number is one of these.
        for source, target in ((ends[0], 0), (ends[1], 1), (ends[1], 2), (ends[2], REPORT_FD)):
            os.dup2(source, target)
        os.closerange(REPORT_FD + 1, 256)
        _limit(config, seconds)
        for number in (signal.SIGPIPE, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.chdir(cwd)
        os.execvpe(argv[0], argv, environment)
    except BaseException as error:
        os.write(2, f"cannot run {argv[0]!r}: {error}\n".encode())
    finally:
        os._exit(127)


def _limit(config: Config, seconds: float) -> None:
    limits = (
        (resource.RLIMIT_AS, config["memory"]),
        (resource.RLIMIT_CPU, int(seconds * config["cpus"]) + 1),
        (resource.RLIMIT_NPROC, config["threads"]),
        (resource.RLIMIT_FSIZE, config["file_size"]),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    )
    for what, most in limits:
        if most is not None:
            hard = resource.getrlimit(what)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(what, (most, most))
    os.nice(1)  # so that this process, which watches, is not starved by what it watches


def _watch(
    config: Config,
    exited: int,
    captures: dict[int, Capture],
    given_end: int | None,
    stdin: bytes,
    seconds: float,
) -> bytes:
    """Feed and read the command until it exits or passes a limit; return why it ended."""
    usage, pending = Usage(config), memoryview(stdin)
    poll = select.poll()
    if given_end is not None:
        os.set_blocking(given_end, False)
        poll.register(given_end, select.POLLOUT)
    for number in (exited, *captures):
        poll.register(number, select.POLLIN)
    now = time.monotonic()
    deadline, look = now + seconds, now + LOOK_EVERY
    try:
        while True:
            for number, _ in poll.poll(max(0.0, min(deadline, look) - now) * 1000 + 1):
                if number == exited:
                    return b"exit"
                if number == given_end:
                    pending = _feed(number, pending)
                    if not pending:
                        poll.unregister(number)
                        os.close(number)
                        given_end = None
                    continue
                data = os.read(number, CHUNK)
                captures[number].add(data)
                if not data:
                    poll.unregister(number)
                elif captures[number].total > config["output"]:
                    return b"output"
            now = time.monotonic()
            if now >= deadline:
                return b"timeout"
            if now >= look:
                excess = usage.excess()
                if excess is not None:
                    return excess
                now = time.monotonic()
                look = now + LOOK_EVERY
    finally:
        if given_end is not None:
            os.close(given_end)


def _feed(number: int, pending: memoryview) -> memoryview:
    try:
        return pending[os.write(number, pending[:CHUNK]) :] if pending else pending
    except BlockingIOError:
        return pending
    except BrokenPipeError:
        return pending[:0]


def _end(config: Config, pid: int) -> int:
    """Kill the command and all that it started; return its code (negative: the signal)."""
    code = None
    while True:
        try:
            # As process 1 of a namespace, -1 means every other process in it, at one instant.
            if config["namespace"]:
                os.kill(-1, signal.SIGKILL)
            else:
                os.killpg(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        try:
            ended, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return -signal.SIGKILL if code is None else code
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)


def _drain(number: int, capture: Capture) -> None:
    """Read what is left in a pipe whose writers are dead (or, without a namespace, may be alive)."""
    os.set_blocking(number, False)
    try:
        while data := os.read(number, CHUNK):
            capture.add(data)
    except BlockingIOError:
        pass
