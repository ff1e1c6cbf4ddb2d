"""Execution of commands inside a sandbox, with limits, until all of their processes have ended."""

from __future__ import annotations

# The module `signal` builds enumerations, which takes a third of the start; `_signal` does not.
import _signal as signal  # type: ignore[import-not-found]
import os
import resource
import select
import time

TYPE_CHECKING = False  # importing typing would take half of the start
if TYPE_CHECKING:
    from typing import Any

    Config = dict[str, Any]  # limits and folders; see empg_envs.swe.caged

REPORT_FD = 3  # descriptor for the report of a command
LOOK_EVERY = 0.02  # seconds between two checks of a running command's resources
CHUNK = 1 << 16


class Capture:
    """The beginning and the end of a stream of any length."""

    def __init__(self, keep: int) -> None:
        """Keep ``keep`` bytes, half of them from the end."""
        self._half = keep // 2
        self._head, self._tail, self.total = bytearray(), bytearray(), 0

    def add(self, data: bytes) -> None:
        """Add the next piece of the stream."""
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
    """The resources of all processes of the namespace together, without PID 1."""

    def __init__(self, config: Config) -> None:
        """Take the limits from the sandbox's configuration."""
        self._config = config
        self._page = resource.getpagesize()
        # If there are too many files already, a command must still be able to run and remove some.
        self._most = [max(config["files"], _count_files(folder)) for folder in config["scratch"]]

    def excess(self) -> bytes | None:
        """Return the name of an exceeded limit, or None."""
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
    """Return the number of files and folders in the file system of a root folder."""
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
    """Run one command until it ends or exceeds a limit, then end all processes that it left.

    Returns:
      Fields: the reason of the end (``exit`` or the name of a limit), return code, head, tail and omitted
      count of the output, and the bytes of the report descriptor.
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
        # The channel has the descriptors 3 and 4, so no pipe has one of the target numbers.
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
    os.nice(1)  # lower priority than the watching process, which must not starve


def _watch(
    config: Config,
    exited: int,
    captures: dict[int, Capture],
    given_end: int | None,
    stdin: bytes,
    seconds: float,
) -> bytes:
    """Write stdin and read output until the command exits or exceeds a limit; return the reason."""
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
    """Kill the command and all processes that it started; return its code (negative for a signal)."""
    code = None
    while True:
        try:
            # For process 1 of a namespace, -1 stands for all other processes in it, at one instant.
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
    """Read the rest of a pipe; its writers are dead, except perhaps without a namespace."""
    os.set_blocking(number, False)
    try:
        while data := os.read(number, CHUNK):
            capture.add(data)
    except BlockingIOError:
        pass
