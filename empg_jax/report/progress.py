"""Live progress: a bar with the main metrics in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

from empg_jax.report.console import make_console

# Metric -> (label, format); shown in this order when present.
SHOWN: dict[str, tuple[str, str]] = {
    "sft_loss": ("loss", "{:.3f}"),
    "sft_eval_loss": ("held-out", "{:.3f}"),
    "success_rate": ("success", "{:.0%}"),
    "eval_success": ("held-out", "{:.1%}"),
    "episode_return": ("reward", "{:.2f}"),
    "entropy": ("entropy", "{:.3f}"),
    "tokens_per_second": ("tok/s", "{:,.0f}"),
}

# Metric -> label; summed over a phase, and shown once there are any.
FAULTS: dict[str, str] = {
    "episodes_discarded": "discarded",
    "worker_restarts": "restarts",
    "groups_failed": "groups given up",
    "tasks_quarantined": "quarantined",
    "nonfinite_steps": "steps left out",
}


class Progress:
    """A progress display with the main metrics, on stderr, because stdout is for results.

    Args:
      enabled: False shows messages only.
      console: where to write (default stderr).
      interval: seconds between two plain lines where there is no terminal.
      clock: seconds, monotonic; replaced in tests.
      prefix: put before every message, to tell the hosts of a run apart.
    """

    def __init__(
        self,
        enabled: bool = True,
        *,
        console: Console | None = None,
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        prefix: str = "",
    ) -> None:
        self._prefix = prefix
        self._console = console or make_console(stderr=True)
        self._enabled, self._interval, self._clock = enabled, interval, clock
        self._live = enabled and self._console.is_terminal
        self._bars: RichProgress | None = None
        self._task: TaskID | None = None
        self._name, self._unit, self._total, self._done = "", "", 0, 0
        self._values: dict[str, float] = {}
        self._faults: dict[str, float] = {}
        self._began = self._said = clock()
        self._first: tuple[float, int] | None = None  # time and count after the first units

    def phase(self, name: str, total: int, unit: str, *, done: int = 0) -> None:
        """Begin a phase of ``total`` units, for example ``("warm start", 200, "updates")``.

        Args:
          name: name of the phase.
          total: number of units in the phase.
          unit: name of the unit.
          done: units that an earlier process did; they do not count for this one's speed.
        """
        self._finish()
        self._name, self._unit, self._total, self._done = name, unit, total, done
        self._values, self._faults = {}, {}
        self._began = self._said = self._clock()
        self._first = None
        if self._live:
            self._bars = self._make_bars()
            self._bars.start()
            self._task = self._bars.add_task(name, total=total, completed=done, unit=unit, values="")
        elif self._enabled:
            self._print(f"{name}: {total} {unit}")

    def advance(self, n: int, values: Mapping[str, float]) -> None:
        """Count ``n`` more units and show the newest values (names outside `SHOWN` are ignored)."""
        self._done += n
        self._values |= values
        for fault in FAULTS.keys() & values.keys():
            self._faults[fault] = self._faults.get(fault, 0.0) + values[fault]
        if self._first is None:
            self._first = self._clock(), self._done
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, advance=n, values=self._text(", "))
        elif self._enabled and self._name:
            now = self._clock()
            if now - self._said >= self._interval and self._done < self._total:
                self._said = now
                self._print(self._line())

    def counting(self, check: Callable[[], None], name: str, total: int) -> Callable[[], None]:
        """Begin a phase of programs to compile; return the function to call before each of them.

        Args:
          check: called with each; it may raise to end the phase.
          name: name of the phase.
          total: number of programs.
        """
        self.phase(name, total, "programs")

        def check_and_count() -> None:
            check()
            self.advance(1, {})

        return check_and_count

    def message(self, text: str) -> None:
        """Print a line above the bar; shown even when progress is off."""
        (self._bars.console if self._bars is not None else self._console).print(
            self._prefix + text, markup=False, soft_wrap=True
        )

    def close(self) -> None:
        """End the running phase; may be called twice."""
        self._finish()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finish(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        elif self._enabled and self._name:
            self._print(self._line())
        self._bars, self._task, self._name = None, None, ""

    def _make_bars(self) -> RichProgress:
        return _Bars(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=4,
        )

    def _text(self, separator: str) -> str:
        shown = [
            f"{label} {template.format(self._values[name])}"
            for name, (label, template) in SHOWN.items()
            if name in self._values
        ]
        faults = [
            f"{label} {self._faults[name]:.0f}" for name, label in FAULTS.items() if self._faults.get(name)
        ]
        # Faults first: a narrow terminal cuts the end of the line.
        return separator.join([*faults, *shown])

    def _line(self) -> str:
        elapsed = self._clock() - self._began
        parts = [
            f"{self._name}: {self._done}/{self._total} {self._unit}",
            self._text(", "),
            _duration(elapsed),
        ]
        if (left := self._seconds_left()) is not None:
            parts.append(f"{_duration(left)} left")
        return ", ".join(part for part in parts if part)

    def _seconds_left(self) -> float | None:
        """Estimate the seconds left. The first units are excluded: they include one-time work."""
        if self._first is None or not self._first[1] < self._done < self._total:
            return None
        when, count = self._first
        return (self._clock() - when) / (self._done - count) * (self._total - self._done)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


class _Bars(RichProgress):
    """Progress bars with the values on a line below, so that the bar fits a narrow terminal."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bars, then one line of values for each."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["values"]:
                yield Text(task.fields["values"], style="cyan", no_wrap=True, overflow="ellipsis")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
