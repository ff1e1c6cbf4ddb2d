"""Traces of whole updates by JAX's profiler."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from empg_jax.config import Config

FOLDER = "profile"  # in the run's folder


class Profiler:
    """Traces the updates that ``train.profile=START:COUNT`` names; a context manager around the loop.

    The trace is written when the last of them ends, or when the loop is left. XProf reads its folder, and
    Perfetto the file ``perfetto_trace.json.gz`` in it.

    Args:
      config: the configuration.
      run_dir: the run's folder.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        start, _, count = (config.train.profile or "0:0").partition(":")
        self._first, self._last = int(start), int(start) + int(count) - 1
        self._folder = run_dir / FOLDER
        self._is_on = False

    def begin(self, update: int) -> None:
        """Start the trace if ``update``, which begins now, is the first to be traced."""
        if self._first <= update <= self._last and not self._is_on:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._is_on = True

    def end(self, update: int) -> None:
        """Write the trace if ``update``, which is over, is the last one."""
        if update >= self._last:
            self._stop()

    def _stop(self) -> None:
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
