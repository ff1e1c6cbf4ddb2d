"""The hosts of a run: one process of this program on each, with JAX's multi-controller runtime below them.

`join` starts the runtime before any device is touched. Afterwards `Hosts` gives the few agreements that the
processes need between their collectives: small values and bytes, through the key-value store of JAX's
coordinator. Every host makes the same calls in the same order. Alone, a call returns its own value at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax

from empg_jax.errors import ConfigError, RunError, Stopped, UserError
from empg_jax.parallel.detect import Section, find_seat
from empg_jax.parallel.rendezvous import Line, Seat, Watch, meet

T = TypeVar("T")
LOOK_SECONDS = 2.0  # length of one wait in the key-value store
SMALL_BYTES = 1 << 16  # content up to this size comes with the word that it is there
PART_BYTES = 1 << 26  # larger content comes in parts: a message of the store holds less than 2 GiB
TELL_SECONDS = 1.0  # from the last words of the coordinator to its end
END_SECONDS = 5.0  # a host that fails waits so long for the others to fail, too


class HostLost(RunError):
    """Another host has failed or is gone."""


class Hosts:
    """The hosts of a run, seen from one of them; without arguments a process alone.

    Args:
      index: number of this host.
      num: number of hosts.

    Attributes:
      on_stop: called with the signal when another host was asked to stop.
      describe_left: names what is left of the run; its sentence ends the message about a lost host.
    """

    def __init__(self, index: int = 0, num: int = 1) -> None:
        self.index, self.num = index, num
        self.on_stop: Callable[[int], None] = lambda signum: None
        self.describe_left: Callable[[], str] = lambda: "start all hosts again"
        self._rounds: Counter[str] = Counter()
        self._watch: Watch | None = None
        self._timeout = LOOK_SECONDS  # seconds that a part may take from the key-value store
        self._parted: str | None = None  # why the hosts agree on nothing any more

    @property
    def is_first(self) -> bool:
        """Whether this host writes the files that all hosts share."""
        return self.index == 0

    # ---------------------------------------------------------------------------------- agreement

    def exchange(self, name: str, content: bytes, *, seconds: float | None = None) -> list[bytes]:
        """Return the content of every host, by index.

        Args:
          name: the same on all hosts; each name counts its own rounds.
          content: of this host.
          seconds: longest wait; None waits for as long as all hosts are there.

        Raises:
          HostLost: another host did not come in time.
        """
        if self.num == 1:
            return [content]
        if self._parted is not None:
            raise HostLost(self._parted)
        client, round_ = _client(), self._rounds[name]
        self._rounds[name] += 1
        key = f"empg/{name}/{round_}/{self.index}"
        if len(content) <= SMALL_BYTES:
            client.key_value_set_bytes(key, b"=" + content)
        else:  # there in full before anybody asks for it
            starts = range(0, len(content), PART_BYTES)
            for part, start in enumerate(starts):
                client.key_value_set_bytes(f"{key}/{part}", content[start : start + PART_BYTES])
            client.key_value_set_bytes(key, b"@%d" % len(starts))
        end = None if seconds is None else time.monotonic() + seconds
        found = [
            content if host == self.index else self._await(f"empg/{name}/{round_}/{host}", host, end)
            for host in range(self.num)
        ]
        # All hosts have come to this round, so they have read the one before.
        if round_:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # and with it what is below it, the parts
                client.key_value_delete(f"empg/{name}/{round_ - 1}/{self.index}")
        return found

    def _await(self, key: str, host: int, end: float | None) -> bytes:
        """Wait for a host in short waits, between which signals are heard; then fetch its content."""
        while True:
            left = LOOK_SECONDS if end is None else min(LOOK_SECONDS, end - time.monotonic())
            if (found := _look_up(key, left)) is not None:
                if found[:1] == b"=":
                    return found[1:]
                return b"".join(self._fetch(f"{key}/{part}", host) for part in range(int(found[1:])))
            if end is not None and time.monotonic() >= end:
                # This host goes its own way from here: waiting for the others again would be for ever.
                self._parted = f"host {host} did not come to {key.split('/')[1]!r} in time"
                raise HostLost(self._parted)

    def _fetch(self, key: str, host: int) -> bytes:
        """Fetch a large value that is there; after a wait that was too short the next one is longer."""
        wait, end = LOOK_SECONDS, time.monotonic() + self._timeout
        while (found := _look_up(key, wait)) is None:
            left = end - time.monotonic()
            if left <= 0:
                self._parted = (
                    f"what host {host} said of {key.split('/')[1]!r} did not arrive within "
                    f"{self._timeout:g} s (hosts.timeout)"
                )
                raise HostLost(self._parted)
            wait = max(LOOK_SECONDS, min(2 * wait, left))
        return found

    def agree(self, name: str, value: Any, *, seconds: float | None = None) -> list[Any]:
        """Return the value of every host, by index; values are JSON."""
        if self.num == 1:
            return [value]
        return [json.loads(each) for each in self.exchange(name, json.dumps(value).encode(), seconds=seconds)]

    def any(self, name: str, flag: bool) -> bool:
        """Return whether the flag is set on any host."""
        return any(self.agree(name, bool(flag)))

    def first(self, name: str, make: Callable[[], T]) -> T:
        """Call a function on host 0 and return its result, of JSON types, on all.

        Raises:
          ConfigError: it raised one on host 0.
        """
        if self.num == 1:
            return make()
        answer: dict[str, Any] = {}
        failure: ConfigError | None = None
        if self.is_first:
            try:
                answer["value"] = make()
            except ConfigError as error:
                failure, answer = error, {"error": str(error)}
        answer = self.agree(name, answer)[0]
        if failure is not None:
            raise failure
        if "error" in answer:
            raise ConfigError(answer["error"])
        value: T = answer["value"]
        return value

    def require_same(self, name: str, value: Any, what: str) -> None:
        """Check that a value is the same on all hosts.

        Raises:
          ConfigError: it is not; the message names ``what`` and the hosts.
        """
        values = self.agree(name, value)
        if odd := [str(host) for host, each in enumerate(values) if each != values[0]]:
            raise ConfigError(f"{what} differs between host 0 and host {', '.join(odd)}")

    def barrier(self, name: str) -> None:
        """Wait for all hosts."""
        self.agree(name, None)

    # ----------------------------------------------------------------------------------- failure

    def ask_stop(self, signum: int) -> None:
        """Tell the other hosts that this one was asked to stop."""
        if self._watch is not None:
            self._watch.tell(stop=signum)

    def _lost(self, sentence: str) -> None:
        """End this process: its next collective would wait for a host that is gone."""
        line = f"error: {sentence}; {self.describe_left()}\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode())
        if self.is_first:
            # JAX ends every process at once, without a word of ours, when its coordinator goes.
            time.sleep(END_SECONDS)
        os._exit(1)

    def watch(self, seat: Seat, lines: dict[int, Line]) -> None:
        """Begin to watch over the other hosts."""
        self._timeout = seat.timeout
        self._watch = Watch(seat, lines, on_lost=self._lost, on_stop=lambda signum: self.on_stop(signum))

    def leave(self, error: BaseException | None) -> None:
        """End together: when all hosts have come here, each with its error or without one.

        Raises:
          HostLost: this host has no error, but another one has.
        """
        if self._watch is None:
            return
        if isinstance(error, SystemExit) and not error.code:
            error = None
        text = None if error is None else (str(error) or type(error).__name__).splitlines()[0]
        try:
            texts = self.agree("end", text, seconds=None if error is None else END_SECONDS)
        except HostLost:
            self._watch.tell(ended=text)
            self._watch.close()
            if self.is_first:
                time.sleep(TELL_SECONDS)
            _end_alone(error)
        self._watch.close()
        self._watch = None
        jax.distributed.shutdown()
        failed = [(host, each) for host, each in enumerate(texts) if each is not None]
        if error is None and failed:
            raise HostLost(f"host {failed[0][0]} failed: {failed[0][1]}")


def _end_alone(error: BaseException | None) -> None:
    """Report an error as the command line does, and end the process.

    Everything is unwound by then. Left to itself, JAX would wait for the others at exit, which do not come,
    and then end the process by a signal.
    """
    code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        code = error.code
    elif isinstance(error, UserError):
        code = error.exit_code
        print(error if isinstance(error, Stopped) else f"error: {error}", file=sys.stderr)
    elif error is not None:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


ALONE = Hosts()


# ------------------------------------------------------------------------------------------ start


@contextlib.contextmanager
def joined(section: Section, facts: Callable[[], Mapping[str, Any]]) -> Iterator[Hosts]:
    """Meet the other hosts, start JAX's runtime over all of them, and end together.

    Args:
      section: the configuration's ``hosts``.
      facts: what must be equal on all hosts.

    Raises:
      ConfigError: not all hosts came, or they differ.
    """
    seat, local_devices = find_seat(section)
    if seat is None:
        yield ALONE
        return
    if getattr(jax.config, "jax_cpu_collectives_implementation", None) in (None, "none"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    lines = meet(seat, facts())
    hosts = Hosts(seat.index, seat.num)
    hosts.watch(seat, lines)
    jax.distributed.initialize(
        seat.address(1),
        seat.num,
        seat.index,
        local_device_ids=local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(10, int(seat.timeout)),
        # Our own watch speaks first, and in a sentence.
        heartbeat_timeout_seconds=max(100, int(4 * seat.timeout)),
        shutdown_timeout_seconds=int(END_SECONDS),
        coordinator_bind_address=seat.address(1) if seat.is_local else None,
    )
    _delay_abort()
    try:
        yield hosts
    except BaseException as error:
        hosts.leave(error)
        raise
    hosts.leave(None)


def _delay_abort() -> None:
    """Give our own sentence time when the coordinator dies: JAX aborts the process at that moment.

    JAX offers no way to be told in place of it (jaxlib 0.10: a callback of the client ends in another
    abort). So the signal of an abort goes to the C library's ``sleep``, for as many seconds as its number
    (6). It needs no lock of Python; the watch goes on meanwhile and ends the process. Else the abort goes on.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    library.signal(int(signal.SIGABRT), ctypes.cast(library.sleep, ctypes.c_void_p))


def _look_up(key: str, seconds: float) -> bytes | None:
    """Wait for a value and its transfer; None when both took longer than that."""
    try:
        return bytes(_client().blocking_key_value_get_bytes(key, max(1, int(seconds * 1000))))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return None
        raise HostLost(f"host 0, the coordinator, does not answer: {error}") from None


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client
