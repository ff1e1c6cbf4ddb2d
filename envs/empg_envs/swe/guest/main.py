"""The first process inside a sandbox: it runs commands, transfers files, and enforces limits.

`empg_envs.swe.caged` starts it as process 1 of a process namespace. There the kernel drops all signals to it
from other processes of the namespace. It exchanges frames over its stdin and stdout. Requests are marshalled
tuples, because their sender is trusted. Replies are lists of byte strings, because data from a sandbox is
never trusted. The program needs only the standard library and imports little, so that it is ready in about
10 ms. It ends at the end of stdin, and the kernel then ends all other processes of the namespace.

With ``"namespace": False`` (the local backend) it is an ordinary process. It can then only kill the process
group of a command, and it cannot count the command's processes.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # see commands.py
import marshal
import os

from empg_envs.swe.guest.commands import run
from empg_envs.swe.guest.files import read, snapshot, unpack, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PR_SET_DUMPABLE = 4


class Channel:
    """Frames on two private descriptors that no command inherits."""

    def __init__(self) -> None:
        """Move stdin and stdout to other descriptors, and redirect the standard descriptors to /dev/null."""
        self._source, self._sink = os.dup(0), os.dup(1)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        os.close(nothing)

    def receive(self) -> Any:
        """Return the next request, or None at the end of stdin."""
        head = self._read(4)
        if head is None:
            return None
        body = self._read(int.from_bytes(head, "big"))
        return None if body is None else marshal.loads(body)

    def send(self, fields: list[bytes]) -> None:
        """Write a list of byte strings as one frame."""
        body = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
        view = memoryview(len(body).to_bytes(4, "big") + body)
        while view:
            view = view[os.write(self._sink, view) :]

    def _read(self, size: int) -> bytes | None:
        parts = []
        while size:
            part = os.read(self._source, min(size, 1 << 20))
            if not part:
                return None
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


OPERATIONS: dict[str, Any] = {
    "run": run,
    "unpack": unpack,
    "snapshot": snapshot,
    "read": read,
    "write": write,
}


def _shut_off() -> None:
    """Protect this process's memory and descriptors (/proc/1) from the commands, which have the same user."""
    import ctypes  # imported late, so that the start does not wait for it

    if ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise SystemExit("cannot shut off the guest's memory")


def main() -> None:
    """Serve requests until the end of stdin."""
    # The kernel drops signals of the namespace to process 1 unless it has a handler; Python has one for
    # SIGINT.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel()
    config = channel.receive()
    if config is None:
        return
    if config["namespace"] and os.getpid() != 1:
        raise SystemExit("a guest with a namespace of its own must be its process 1")
    os.umask(0o022)
    channel.send([b"ready"])
    _shut_off()
    while (request := channel.receive()) is not None:
        operation, *arguments = request
        try:
            reply = [b"ok", *OPERATIONS[operation](config, *arguments)]
        except (OSError, ValueError, MemoryError) as error:
            reply = [b"error", f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace")]
        channel.send(reply)
    os._exit(0)


if __name__ == "__main__":
    main()
