"""The meeting of the hosts of a run before JAX starts, and a line from each to host 0 for as long as it runs.

JAX's own start ends a process without a sentence for the user when a host is missing, comes twice, or has
another configuration; and when one dies, the others hang in a collective until a long limit. So the hosts
meet here first. Each sends host 0 what must be equal everywhere. Host 0 answers all of them alike: go on, or
why not. The connection stays open: a closed or silent one means that a host is gone.

Lines are JSON. Nothing that arrives is run or stored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from empg_jax.errors import ConfigError

MAX_LINE = 1 << 20  # bytes; the configuration in JSON takes a few thousand
BEATS = 4  # signs of life in the time after which a silent host counts as gone
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclasses.dataclass(frozen=True)
class Seat:
    """The place of this process among the hosts.

    Attributes:
      coordinator: host and port at which host 0 answers.
      num: number of hosts.
      index: number of this one.
      timeout: seconds to wait for all hosts, and after which a silent one is gone.
    """

    coordinator: tuple[str, int]
    num: int
    index: int
    timeout: float

    @property
    def is_local(self) -> bool:
        """Whether all hosts are processes of one machine."""
        return self.coordinator[0] in LOOPBACK

    def address(self, after: int = 0) -> str:
        """Return ``HOST:PORT``, that many ports after the coordinator's; IPv6 addresses are in brackets."""
        host, port = self.coordinator
        return f"[{host}]:{port + after}" if ":" in host else f"{host}:{port + after}"


class Line:
    """A connection that carries one JSON object per line, in both directions.

    Args:
      connection: an open socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rb")
        self._lock = threading.Lock()
        self.peer: dict[str, Any] = {}
        self.is_silent = False  # whether the last wait was in vain, on an open line

    def send(self, **values: Any) -> None:
        """Send an object; a closed line is left to whoever reads it."""
        with contextlib.suppress(OSError), self._lock:
            self._connection.sendall(json.dumps(values).encode() + b"\n")

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """Wait for the next object; None when the line is closed, silent for so long, or talks otherwise."""
        try:
            self._connection.settimeout(max(seconds, 0.01))
            found = json.loads(self._file.readline(MAX_LINE))
        except (OSError, ValueError) as error:
            self.is_silent = isinstance(error, TimeoutError)
            return None
        return found if isinstance(found, dict) else None

    def finish(self) -> None:
        """Send no more. What the other end still sends is read: else it could lose our last words."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the line."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._file.close()
        self._connection.close()


def meet(seat: Seat, facts: Mapping[str, Any]) -> dict[int, Line]:
    """Wait until all hosts have come, and check that they are of one mind.

    Args:
      seat: the place of this host.
      facts: what must be equal on all hosts, by name.

    Returns:
      Host 0: a line to each other host, by index. Another host: its line to host 0.

    Raises:
      ConfigError: a host is missing, an index is used twice, the facts differ, or nobody answers.
    """
    own = {"index": seat.index, "num": seat.num, "name": socket.gethostname(), "pid": os.getpid()}
    own["facts"] = {name: repr(value) for name, value in facts.items()}
    return _receive_hosts(seat, own) if seat.index == 0 else {0: _call_first(seat, own)}


def _receive_hosts(seat: Seat, own: dict[str, Any]) -> dict[int, Line]:
    """Collect the other hosts, and answer all alike."""
    end = time.monotonic() + seat.timeout
    lines: dict[int, Line] = {}
    every: list[Line] = []
    refusal = None
    with _listen(seat) as server:
        while len(lines) < seat.num - 1 and refusal is None:
            server.settimeout(max(end - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = [str(i) for i in range(1, seat.num) if i not in lines]
                word = "host" if len(missing) == 1 else "hosts"
                refusal = (
                    f"{word} {', '.join(missing)} of {seat.num} did not come within {seat.timeout:g} s "
                    f"(hosts.timeout): start the same command there with hosts.index={missing[0]}"
                )
                break
            line = Line(connection)
            peer = line.receive(min(5.0, seat.timeout))
            if peer is None or not isinstance(peer.get("index"), int):  # not one of ours: a port scan
                line.close()
                continue
            line.peer = peer
            every.append(line)
            refusal = _compare(own, peer, {index: known.peer for index, known in lines.items()})
            lines[peer["index"]] = line
    for line in every:
        line.send(refused=refusal, names={0: own["name"]})
    if refusal is not None:
        for line in every:
            line.close()
        raise ConfigError(refusal)
    return lines


def _compare(own: dict[str, Any], peer: dict[str, Any], known: dict[int, dict[str, Any]]) -> str | None:
    """Return why a host that came cannot take part; None if it can."""
    index, where = peer["index"], f"{peer.get('name')} (process {peer.get('pid')})"
    if peer.get("num") != own["num"]:
        return f"hosts.num={peer.get('num')} on {where}, but hosts.num={own['num']} on host 0"
    if not 0 < index < own["num"]:
        return f"hosts.index={index} on {where} is not among the hosts 1 to {own['num'] - 1}"
    if index in known:
        first = known[index]
        return (
            f"hosts.index={index} is used twice: by {first['name']} (process {first['pid']}) and by {where}"
        )
    mine, theirs = own["facts"], peer.get("facts") or {}
    names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    if names:
        shown = ", ".join(f"{n}={theirs.get(n)} (host 0: {mine.get(n)})" for n in names[:5])
        return (
            f"host {index}, {where}, differs from host 0: {shown}; all hosts need the same "
            "command (hosts.enabled=false trains alone)"
        )
    return None


def _listen(seat: Seat) -> socket.socket:
    host, port = seat.coordinator
    try:
        if seat.is_local or not socket.has_dualstack_ipv6():
            family = socket.AF_INET6 if seat.is_local and ":" in host else socket.AF_INET
            return socket.create_server((host if seat.is_local else "", port), family=family)
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    except OSError as error:
        raise ConfigError(
            f"hosts.coordinator={seat.address()}: host 0 cannot listen there ({error.strerror}); is "
            "hosts.index=0 used twice, or does another run use the port?"
        ) from None


def _call_first(seat: Seat, own: dict[str, Any]) -> Line:
    """Call host 0 until it answers, and wait for its verdict."""
    end = time.monotonic() + seat.timeout
    where = seat.address()
    while True:
        try:
            line = Line(socket.create_connection(seat.coordinator, timeout=2.0))
            break
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"hosts.coordinator={where}: nobody answers within {seat.timeout:g} s ({error}); host 0 "
                    "must run there, with hosts.index=0"
                ) from None
            time.sleep(0.1)
    line.send(**own)
    # Host 0 itself waits hosts.timeout for the others, from a moment that may lie after ours.
    answer = line.receive(2 * seat.timeout + 5.0)
    if answer is None or "names" not in answer:
        line.close()
        raise ConfigError(f"hosts.coordinator={where}: host 0 ended, or another program listens there")
    if answer["refused"] is not None:
        line.close()
        raise ConfigError(str(answer["refused"]))
    line.peer = {"name": answer["names"]["0"], "index": 0}
    return line


class Watch:
    """The watch over the other hosts: threads that hear of their end and of requests to stop.

    Args:
      seat: the place of this host.
      lines: from `meet`.
      on_lost: called with a sentence, in a thread of the watch, when a host is gone.
      on_stop: called with the signal when another host was asked to stop.
    """

    def __init__(
        self,
        seat: Seat,
        lines: dict[int, Line],
        *,
        on_lost: Callable[[str], None],
        on_stop: Callable[[int], None],
    ) -> None:
        self._seat, self._lines, self._on_lost, self._on_stop = seat, lines, on_lost, on_stop
        self._is_over = threading.Event()
        for index in lines:
            threading.Thread(target=self._read, args=(index,), name=f"host-{index}", daemon=True).start()
        threading.Thread(target=self._beat, name="host-beat", daemon=True).start()

    def _beat(self) -> None:
        while not self._is_over.wait(self._seat.timeout / BEATS):
            self.tell(beat=True)

    def tell(self, *, but: int | None = None, **values: Any) -> None:
        """Send an object to the hosts at the other ends of the lines."""
        if "ended" in values:
            self._is_over.set()  # the others end as well, and this host need not miss them
        for index, line in self._lines.items():
            if index != but:
                line.send(**values)

    def _read(self, index: int) -> None:
        line = self._lines[index]
        name, is_done = f"host {index} ({line.peer['name']})", False
        while True:
            heard = line.receive(self._seat.timeout)
            is_done = is_done or (heard is not None and "done" in heard)
            if is_done or self._is_over.is_set():
                if heard is None:
                    line.close()
                    return
                continue
            if heard is None:
                heard = {"gone": f"{name} {self._describe_end(line)}"}
            elif "ended" in heard:
                heard = {"gone": f"{name} has ended: {heard['ended']}"}
            if "gone" in heard or "stop" in heard:
                self.tell(but=index, **heard)  # the others have a line to host 0 only
            if "gone" in heard:
                self._on_lost(str(heard["gone"]))  # ends this process, as a rule
                line.close()
                return
            if "stop" in heard:
                self._on_stop(int(heard["stop"]))

    def _describe_end(self, line: Line) -> str:
        if line.is_silent:
            return f"did not answer for {self._seat.timeout:g} s (hosts.timeout): it is stuck or cut off"
        return "is gone: its connection is closed"

    def close(self) -> None:
        """End the watch; the others do not miss this host from here on."""
        self._is_over.set()
        self.tell(done=True)
        for line in self._lines.values():
            line.finish()
