"""Services of a long-running process: stop requests, phase times, a count of compilations."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import jax

from empg_jax.config.places import expand
from empg_jax.errors import Interrupted

if TYPE_CHECKING:
    from empg_jax.config import Config

CACHE_FOLDER = "empg-jax/xla"  # below the user's cache folder
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def prepare_jax(config: Config) -> None:
    """Set what the configuration says of the whole process: compiled programs on disk, precision of products.

    Call it before the first program is built.
    """
    use_compile_cache(config.compile_cache)
    asked = config.model.matmul_precision
    precision = find_precision(asked, config.model.dtype, jax.default_backend())
    # What JAX was told by other means (JAX_DEFAULT_MATMUL_PRECISION) stays where the configuration is silent.
    if precision is not None and (
        asked is not None or getattr(jax.config, "jax_default_matmul_precision", None) is None
    ):
        jax.config.update("jax_default_matmul_precision", precision)


def find_precision(asked: str | None, dtype: str, platform: str) -> str | None:
    """Return JAX's default precision of matrix products; None leaves it alone.

    GPUs and TPUs multiply float32 with 10 or 7 bits after the point unless they are told otherwise, which is
    less than the type promises. CPUs do what it promises, and bfloat16 products lose nothing.

    Args:
      asked: ``model.matmul_precision``.
      dtype: ``model.dtype``.
      platform: JAX's name of the devices.
    """
    if asked is None and dtype == "float32" and platform != "cpu":
        return "highest"
    return asked


def use_compile_cache(folder: str | None) -> None:
    """Keep compiled programs on disk, so that the next process loads them in place of compiling.

    A folder that JAX was told by other means (``JAX_COMPILATION_CACHE_DIR``) stays in use.

    Args:
      folder: parent of the programs; ``auto`` is the user's cache folder, None keeps nothing.
    """
    if folder is None or getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder(folder)))
    # Small programs take longer to compile than to read, and a run has dozens of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def cache_folder(folder: str) -> Path:
    """Return the folder of this machine's compiled programs inside ``folder``; see `use_compile_cache`."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    parent = expand(f"{home}/{CACHE_FOLDER}" if folder == "auto" else folder, "compile_cache")
    return parent / _machine_key()


def _machine_key() -> str:
    """Return a short key of the processor: machine code for one may not run on another that shares a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    kinds = sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))})
    content = "\n".join([platform.machine(), platform.processor(), *kinds])
    return hashlib.sha256(content.encode()).hexdigest()[:12]


class StopRequest:
    """A handler that turns the first SIGINT or SIGTERM into a flag, and the second into `KeyboardInterrupt`.

    Use it as a context manager. Outside the main thread signals cannot be caught, and only `set` works. Once
    it is armed (`arm`), a thread ends the process if the main thread comes to no stopping point.

    Args:
      spread: called with the signal at its arrival, to tell other hosts.

    Attributes:
      signum: the signal that requested the stop; 0 while there is no request.
    """

    def __init__(self, spread: Callable[[int], None] | None = None) -> None:
        self.signum, self._spread = 0, spread
        self._previous: dict[int, object] = {}
        self._watch: _Watch | None = None

    def __call__(self) -> bool:
        """Return whether the run was asked to stop."""
        return self.signum != 0

    def check(self) -> None:
        """Raise `Interrupted` if the run was asked to stop.

        Raises:
          Interrupted: there was a request.
        """
        if self.signum:
            raise Interrupted

    def set(self, signum: int = signal.SIGTERM) -> None:
        """Ask the run to stop."""
        self.signum = int(signum)

    def arm(self, grace: float, leave: Callable[[int, str], None]) -> None:
        """Bound the time from a signal to the end of the process; a second signal ends it at once.

        Args:
          grace: seconds from the first signal to the end.
          leave: called with the signal and the reason, in a thread of its own, before the process exits with
            128 + signal. It must not wait for the main thread.
        """
        if self._previous:
            self._watch = _Watch(grace, leave, pending=self.signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum = signum
            if self._spread is not None:
                # In a thread: the main one, between two of whose steps this runs, may hold a lock.
                threading.Thread(target=self._spread, args=(signum,), daemon=True).start()
        elif self._watch is None:
            # A second signal means that the user will not wait. Once armed, the other thread sees to it.
            raise KeyboardInterrupt

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._watch is not None:
            self._watch.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()


class _Watch:
    """A thread that hears of signals from the C handler, even while the main thread is busy.

    Python calls a handler between two bytecodes of the main thread. A compilation or a dispatch that hangs
    has none.
    """

    def __init__(self, grace: float, leave: Callable[[int, str], None], *, pending: int) -> None:
        self._grace, self._leave = grace, leave
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        if pending:
            os.write(self._write, bytes([pending]))
        self._thread = threading.Thread(target=self._run, name="stop-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        signum = self._next_signal(None)
        if not signum:
            return
        # Closed in time, or asked again, or neither.
        again = self._next_signal(time.monotonic() + self._grace)
        if again == 0:
            return
        why = f"no stopping point within {self._grace:g} s" if again is None else "asked a second time"
        try:
            self._leave(signum, why)
        finally:
            os._exit(128 + signum)

    def _next_signal(self, end: float | None) -> int | None:
        """Wait for SIGINT or SIGTERM; 0 after `close`, None at the time ``end``."""
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([self._read], [], [], left)[0]:
                return None
            found = os.read(self._read, 1)
            # Other signals that have a handler in Python come this way, too.
            if not found or found[0] in (0, signal.SIGINT, signal.SIGTERM):
                return found[0] if found else 0

    def close(self) -> None:
        signal.set_wakeup_fd(self._before)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)


class PhaseClock:
    """Wall seconds per phase, over all attempts of a run.

    A phase inside another one stops the other's time, so that no second counts twice.
    """

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self._seconds: dict[str, float] = dict(seconds or {})
        self._lap = dict(self._seconds)
        self._open: list[str] = []  # the phases that have begun, innermost last
        self._since = 0.0  # when the innermost one began or went on

    @property
    def seconds(self) -> dict[str, float]:
        """Wall seconds by phase up to now, a copy; those of a phase that has not ended count, too."""
        if self._open:
            self._count(time.monotonic())
        return dict(self._seconds)

    def add(self, seconds: dict[str, float]) -> None:
        """Add what earlier attempts took."""
        for name, each in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + each

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside the block, but not in phases inside it, to phase ``name``."""
        self._count(time.monotonic())
        self._open.append(name)
        try:
            yield
        finally:
            self._count(time.monotonic())
            self._open.pop()

    def _count(self, now: float) -> None:
        """Give the time up to now to the innermost phase."""
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    def lap(self) -> dict[str, float]:
        """Return the wall seconds of each phase since the last call; phases without time are absent."""
        now = self.seconds
        spent = {name: total - self._lap.get(name, 0.0) for name, total in now.items()}
        self._lap = now
        return {name: seconds for name, seconds in spent.items() if seconds > 0}


class CompileCounter:
    """A count of the programs that JAX compiles, from JAX's own monitoring events."""

    def __init__(self) -> None:
        self.count = 0

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        if event == COMPILE_EVENT:
            self.count += 1

    def __enter__(self) -> CompileCounter:
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
