"""The parent of test sessions: it never imports the package under test, and alone writes the report.

A judge's cage runs it once. It loads the test framework and forks one process per session; only that process
imports the package. What the process says about its tests (its *claims*) comes through a pipe. How it ended
comes from the kernel. Both are passed on to the judge outside, who compares them. The package's process has
neither the descriptor of the report nor access to this process's memory, and when its session is over, all
processes that it left are killed and ``/tmp`` is emptied, so that no session can leave word for another.

The requests are frames on stdin: a header (``runner``, ``namespace``), one frame per session (``root``,
``paths``, ``only``, ``nonce``), and a last one with the nonce of the report (``end``). Each is read when its
turn has come, so that a session's process never holds the secrets of the others.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # see commands.py
import contextlib
import ctypes
import gc
import json
import os
import resource
import select
import sys
import time
from typing import Any

REPORT_FD = 3
PR_SET_DUMPABLE = 4
MAX_CLAIMS = 7 << 20  # kept bytes of a session's claims
CRASHED = 70  # exit code of a session whose runner raised
PATIENCE = 2.0  # seconds to wait for the death of killed processes


def _read_frame() -> Any:
    """Return the next request; None at the end of stdin."""
    head = _read(4)
    return None if head is None else json.loads(_read(int.from_bytes(head, "big")) or b"null")


def _read(size: int) -> bytes | None:
    # Not `sys.stdin`, whose buffer would hold the frames of later sessions.
    parts = bytearray()
    while len(parts) < size:
        part = os.read(0, size - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def _send(report: int, *parts: bytes) -> None:
    for part in parts:
        view = memoryview(len(part).to_bytes(4, "big") + part)
        while view:
            view = view[os.write(report, view) :]


def _set_dumpable(value: int) -> None:
    """Open or shut ``/proc/PID/mem`` and its like of this process for processes of the same user."""
    if ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, value, 0, 0, 0):
        raise SystemExit("cannot set the protection of the process's memory")


def _fork_session(order: dict[str, Any], report: int, play: Any) -> tuple[int, int]:
    """Start a session; return its process and the descriptor of its claims."""
    claims, claims_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(claims_end)
        return pid, claims
    code = CRASHED
    try:
        os.setsid()
        for number in (report, claims):
            os.close(number)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.close(nothing)
        _set_dumpable(1)
        code = play(order, claims_end)
    finally:
        os._exit(code)
    raise AssertionError("unreachable")


def _watch_session(pid: int, claims: int) -> tuple[int, bytes, int]:
    """Read claims until the process has ended; return its code, the kept claims and their number of bytes."""
    exited = os.pidfd_open(pid)
    poll, kept, total = select.poll(), bytearray(), 0
    poll.register(exited, select.POLLIN)
    poll.register(claims, select.POLLIN)
    try:
        while True:
            ready = {number for number, _ in poll.poll()}
            # The pipe first: after the end it holds the rest of the claims.
            if claims in ready:
                data = os.read(claims, 1 << 16)
                kept += data[: MAX_CLAIMS - len(kept)]
                total += len(data)
                if not data:
                    poll.unregister(claims)
                continue
            if exited in ready:
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), bytes(kept), total
    finally:
        os.close(exited)
        os.close(claims)


def _traits() -> tuple[Any, ...]:
    """Return what a process of the same user can change in this one, and the next session would inherit."""
    limits = [value for name, value in sorted(vars(resource).items()) if name.startswith("RLIMIT_")]
    return (
        [resource.getrlimit(limit) for limit in limits],
        os.getpriority(os.PRIO_PROCESS, 0),
        os.sched_getscheduler(0),
        sorted(os.sched_getaffinity(0)),
    )


def _clear(pid: int, has_namespace: bool) -> bool:
    """End what a session left running, and remove its files; return whether nothing is left."""
    if not has_namespace:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        return True
    deadline = time.monotonic() + PATIENCE
    while _others():
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # all processes of the namespace but process 1 and this one
        if time.monotonic() > deadline:
            return False
    mounts = _find_mounts()
    return all([_empty(folder, mounts) for folder in ("/tmp", "/dev/shm")])


def _find_mounts() -> list[str]:
    """Return the places where something is mounted. Sessions cannot change them."""
    with open("/proc/self/mountinfo", "rb") as table:
        # Spaces and the like are written as octal numbers, for example \040.
        places = [line.split(b" ")[4].decode("unicode_escape").encode("latin-1") for line in table]
    return [os.fsdecode(place) for place in places]


def _others() -> bool:
    """Whether a process other than process 1 and this one is alive."""
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in (1, os.getpid()):
            try:
                with open(f"/proc/{name}/stat", "rb") as stat:
                    if stat.read().rpartition(b") ")[2][:1] not in (b"Z", b"X"):
                        return True
            except OSError:
                continue
    return False


def _empty(folder: str, mounts: list[str]) -> bool:
    """Remove everything in a folder but what is mounted there, such as an interpreter that lies in ``/tmp``.

    Returns:
      Whether this succeeded.
    """
    try:
        for name in os.listdir(folder):
            path = f"{folder}/{name}"
            if path in mounts:
                continue
            if any(place.startswith(f"{path}/") for place in mounts):
                os.chmod(path, 0o755)
                if not _empty(path, mounts):
                    return False
            else:
                _remove(path)
    except (OSError, RecursionError):
        return False
    return True


def _remove(path: str) -> None:
    if os.path.islink(path) or not os.path.isdir(path):
        os.unlink(path)
        return
    os.chmod(path, 0o700)
    for name in os.listdir(path):
        _remove(f"{path}/{name}")
    os.rmdir(path)


def _load_pytest() -> None:
    """Load pytest and the installed plugins once for all sessions; each session registers them anew."""
    import importlib.metadata

    from _pytest.assertion.rewrite import AssertionRewritingHook

    for entry in importlib.metadata.entry_points(group="pytest11"):
        try:
            entry.load()
        except Exception:  # the session will say so
            continue
    # The plugins' own assertions are not rewritten now, about which pytest would warn.
    AssertionRewritingHook._warn_already_imported = lambda self, name: None  # type: ignore[method-assign]


def main() -> None:
    """Run the requested sessions and report them; see the module's text."""
    home = os.path.abspath(__file__).removesuffix("/empg_envs/swe/guest/warden.py")
    sys.path.insert(0, home)
    from empg_envs.swe.guest import seals  # noqa: F401  # loaded before the path is taken away
    from empg_envs.swe.guest.runner import play

    sys.path.remove(home)
    report = os.dup(REPORT_FD)
    os.close(REPORT_FD)
    _set_dumpable(0)
    header = _read_frame()
    # A guard on top of the header: outside of a namespace the parent is not process 1.
    has_namespace = header["namespace"] and os.getppid() == 1
    if header["runner"] == "pytest":
        _load_pytest()
    gc.collect()
    gc.freeze()
    traits = _traits()
    while (order := _read_frame()) is not None and "end" not in order:
        nonce = order["nonce"]
        pid, claims = _fork_session(order, report, play)
        code, kept, total = _watch_session(pid, claims)
        is_clear = _clear(pid, has_namespace) and _traits() == traits
        fact = {"nonce": nonce, "code": code, "omitted": total - len(kept), "clear": is_clear}
        _send(report, json.dumps(fact).encode(), kept)
    if order is not None:
        _send(report, json.dumps(order).encode())


if __name__ == "__main__":
    main()
