"""Services of a long-running process: stop requests, phase times, a count of compilations."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import jax

from empg_jax.errors import Interrupted

CACHE_FOLDER = "empg-jax/xla"  # below the user's cache folder
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def use_compile_cache(folder: str | None) -> None:
    """Keep compiled programs on disk, so that the next process loads them in place of compiling.

    A folder that JAX was told by other means (``JAX_COMPILATION_CACHE_DIR``) stays in use.

    Args:
      folder: parent of the programs; ``auto`` is the user's cache folder, None keeps nothing.
    """
    if folder is None or getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    parent = Path(f"{home}/{CACHE_FOLDER}" if folder == "auto" else folder).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(parent / _machine_key()))
    # Small programs take longer to compile than to read, and a run has dozens of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


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

    Use it as a context manager. Outside the main thread signals cannot be caught, and only `set` works.

    Attributes:
      signum: the signal that requested the stop; 0 while there is no request.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._previous: dict[int, object] = {}

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

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # A second signal means that the user will not wait for the checkpoint.
        if self.signum:
            raise KeyboardInterrupt
        self.signum = signum

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()


class PhaseClock:
    """Wall seconds per phase, over all attempts of a run."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = dict(seconds or {})
        self._lap = dict(self.seconds)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside the block to phase ``name``."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def lap(self) -> dict[str, float]:
        """Return the wall seconds of each phase since the last call; phases without time are absent."""
        spent = {name: total - self._lap.get(name, 0.0) for name, total in self.seconds.items()}
        self._lap = dict(self.seconds)
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
