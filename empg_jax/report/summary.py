"""The table at the end of a run: the held-out panel before and after, and the costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from empg_jax.report.console import make_console

Z = 1.959964  # 97.5 % quantile of the standard normal distribution, for 95 % intervals
# Rows of the before/after table: key stem in summary.json -> (label, format).
COMPARED: dict[str, tuple[str, str]] = {
    "eval_success": ("success", "{:.1%}"),
    "eval_return": ("return", "{:.3f}"),
    "eval_turns": ("turns per episode", "{:.1f}"),
    "eval_entropy": ("entropy (nats)", "{:.3f}"),
    "eval_invalid_actions": ("invalid actions", "{:.1%}"),
}


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the content of ``summary.json``, by default on stderr; absent keys are left out."""
    (console or make_console(stderr=True)).print(render_summary(summary))


def render_summary(summary: Mapping[str, Any]) -> Group:
    """Render the before/after table and the table of costs as one object."""
    return Group(_comparison(summary), _costs(summary))


def _comparison(summary: Mapping[str, Any]) -> Table:
    tasks = summary.get("eval_tasks")
    table = Table(title=f"Held-out panel, {tasks} tasks" if tasks else "Held-out panel", title_justify="left")
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for stem, (label, template) in _compared(summary).items():
        values = [summary.get(f"{stem}_{when}") for when in ("before", "after")]
        if all(value is None for value in values):
            continue
        cells = ["-" if value is None else template.format(value) for value in values]
        if stem == "eval_success" and tasks:
            played = [tasks - int(summary.get(f"eval_missing_{when}") or 0) for when in ("before", "after")]
            cells = [
                f"{cell} {_interval(wilson_interval(round(value * n), n))}"
                if value is not None and n
                else cell
                for cell, value, n in zip(cells, values, played, strict=True)
            ]
        before, after = values
        change = _change(before, after, template)
        if stem == "eval_success" and "eval_gain_interval" in summary:
            interval = summary["eval_gain_interval"]
            change += " (n/a)" if interval is None else f" {_interval(interval, sign='+')}"
        table.add_row(label, *cells, change)
    return table


def _compared(summary: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the rows of the table: those of `COMPARED`, and the success in each group of tasks."""
    start = "eval_success/"
    found = {name.rpartition("_")[0] for name in summary if name.startswith(start)}
    groups = {stem: (f"success, {stem.removeprefix(start)}", "{:.1%}") for stem in sorted(found)}
    return {"eval_success": COMPARED["eval_success"], **groups, **COMPARED}


def paired_interval(before: str, after: str) -> tuple[float, float] | None:
    """Compute the 95 % interval of the gain in success rate on the same tasks before and after.

    Args:
      before: ``1`` or ``0`` for every task, in a fixed order; ``-`` for a task without a result, which is
        left out.
      after: the results of the same tasks later.

    Returns:
      Lower and upper bound; None where no task has both results.

    Raises:
      ValueError: the two differ in length, or are empty.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"{len(before)} tasks before and {len(after)} after cannot be paired")
    pairs = [pair for pair in zip(before, after, strict=True) if "-" not in pair]
    if not pairs:
        return None
    return gain_interval(pairs.count(("0", "1")), pairs.count(("1", "0")), len(pairs))


def gain_interval(gained: float, lost: float, total: int) -> tuple[float, float]:
    """Compute the 95 % interval of the difference of paired proportions.

    Only tasks whose result changed carry information, and their number is subject to chance too. The bounds
    are those of the score test for paired proportions (Tango 1998), which holds its level for few tasks and
    has width where nothing changed.

    Args:
      gained: tasks that were solved only later; a part of one is a gain in a part of a task's attempts.
      lost: tasks that were solved only before.
      total: all tasks, at least 1.
    """
    # A gain is a loss of the other order, so one bound is enough.
    return -_largest_gain(lost, gained, total), _largest_gain(gained, lost, total)


def _largest_gain(gained: float, lost: float, total: int) -> float:
    """Find, by bisection, the largest gain that the score test does not reject."""
    low, high = (gained - lost) / total, 1.0
    for _ in range(60):  # the precision of a double
        gain = (low + high) / 2
        # The likeliest rate of losses under this gain solves 2 n q^2 + b q + c = 0.
        b = (2 * total - gained + lost) * gain - gained - lost
        c = -lost * gain * (1 - gain)
        rate = (math.sqrt(max(b * b - 8 * total * c, 0.0)) - b) / (4 * total)
        variance = total * (2 * rate + gain * (1 - gain))
        is_rejected = total * gain - (gained - lost) > Z * math.sqrt(max(variance, 0.0))
        low, high = (low, gain) if is_rejected else (gain, high)
    return low


def wilson_interval(count: float, total: int) -> tuple[float, float]:
    """Compute Wilson's 95 % interval of a success rate; unlike the normal interval it has width at 0 and 1.

    Args:
      count: successes; a part of one is a success in a part of a task's attempts.
      total: independent tasks, at least 1.
    """
    rate, z2 = count / total, Z * Z
    center = (rate + z2 / (2 * total)) / (1 + z2 / total)
    half = Z / (1 + z2 / total) * math.sqrt(rate * (1 - rate) / total + z2 / (4 * total * total))
    return max(0.0, center - half), min(1.0, center + half)


def _interval(bounds: Sequence[float], *, sign: str = "") -> str:
    low, high = bounds
    return f"[{low * 100:{sign}.1f}, {high * 100:{sign}.1f}]"


def _change(before: float | None, after: float | None, template: str) -> str:
    if before is None or after is None:
        return "-"
    sign = "+" if after >= before else "-"
    if "%" in template:
        return f"{sign}{abs(after - before) * 100:.1f} points"
    return sign + template.format(abs(after - before))


def _costs(summary: Mapping[str, Any]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    seconds = summary.get("wall_seconds") or {}
    if "total" in seconds:
        phases = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if name != "total")
        table.add_row("wall seconds", f"{seconds['total']:.0f}" + (f" ({phases})" if phases else ""))
    for key, label in (
        ("updates", "updates"),
        ("tokens_sampled", "tokens sampled"),
        ("recompiles_after_warmup", "recompiles after warm-up"),
    ):
        if key in summary:
            table.add_row(label, f"{summary[key]:,}")
    if summary.get("trajectories"):
        counts = ", ".join(f"{reason} {count:,}" for reason, count in summary["trajectories"].items())
        table.add_row("episodes", counts)
    return table
