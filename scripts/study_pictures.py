"""The picture of a study: a row per task that has runs; success, entropy, balance, gradient, drift by arm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from study_ledger import Line
from study_plan import Study
from study_results import gather

from empg_jax.files import replacing
from empg_jax.report.curves import as_label, smooth
from empg_jax.report.statistics import band

RESAMPLES = 1_000  # of a band; the table's intervals take more


def draw(study: Study, lines: Sequence[Line], path: Path) -> None:
    """Draw the tasks that have runs as PNG; the same lines give the same picture."""
    # Figure without pyplot, which has global state and may need a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = gather(study, lines)
    has_runs = [task for task in study.tasks if any(results.lines(task, arm) for arm in study.arms)]
    tasks = has_runs or list(study.tasks)
    figure = Figure(figsize=(20, 3.6 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(tasks), 5, squeeze=False)
    for task, row in zip(tasks, grid, strict=True):
        for number, arm in enumerate(study.arms):
            runs = results.lines(task, arm)
            color = f"C{number % 10}"
            style = {"color": color, "label": as_label(arm), "linestyle": "-" if number < 10 else "--"}
            _success(row[0], runs, style)
            _over_time(row[1], runs, "entropy", style)
            _balance(row[2], runs, style)
            _points(row[3], runs, ("entropy", "grad_norm"), style)
            _points(row[4], runs, ("entropy_drift_predicted", "entropy_drift_measured"), style)
        _label(row, task)
    _legend(figure, grid.flat)
    with replacing(path) as file:
        # Without the version of matplotlib, which would change the file and nothing in it.
        figure.savefig(file, format="png", dpi=90, metadata={"Software": None})


def _success(axes: Any, runs: Sequence[Line], style: dict[str, Any]) -> None:
    """The mean over seeds of the held-out success, with its 95 % bootstrap band."""
    curves = [dict(map(tuple, line["curve"])) for line in runs]
    updates = sorted(set.intersection(*map(set, curves))) if curves else []
    if not updates:
        return
    values = np.array([[curve[update] for curve in curves] for update in updates])
    axes.plot(updates, values.mean(axis=1), linewidth=2, **style)
    if len(runs) > 1:
        bands = np.array([band(each, RESAMPLES) for each in values])
        axes.fill_between(updates, *bands.T, color=style["color"], alpha=0.15, linewidth=0)


def _mean_series(runs: Sequence[Line], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The mean over seeds of a series, smoothed over a twentieth of the updates."""
    rows = [line["series"] for line in runs if line["series"]["update"]]
    if not rows:
        return np.zeros(0), np.zeros(0)
    updates = sorted({update for row in rows for update in row["update"]})
    place = {update: number for number, update in enumerate(updates)}
    table = np.full((len(rows), len(updates)), np.nan)
    for values, row in zip(table, rows, strict=True):
        values[[place[update] for update in row["update"]]] = [_nan(value) for value in row[name]]
    known = np.isfinite(table)
    sums, counts = np.where(known, table, 0.0).sum(axis=0), known.sum(axis=0)
    means = np.divide(sums, counts, out=np.full(len(updates), np.nan), where=counts > 0)
    return np.array(updates), smooth(means, max(1, len(updates) // 20))


def _over_time(axes: Any, runs: Sequence[Line], name: str, style: dict[str, Any]) -> None:
    updates, values = _mean_series(runs, name)
    axes.plot(updates, values, linewidth=1.5, **style)


def _balance(axes: Any, runs: Sequence[Line], style: dict[str, Any]) -> None:
    """The share of turns with a positive advantage less that with a negative one."""
    updates, positive = _mean_series(runs, "advantage_positive")
    axes.plot(updates, positive - _mean_series(runs, "advantage_negative")[1], linewidth=1.5, **style)


def _points(axes: Any, runs: Sequence[Line], names: tuple[str, str], style: dict[str, Any]) -> None:
    """Every update of every seed as a point."""
    x, y = ([_nan(value) for line in runs for value in line["series"][name]] for name in names)
    axes.plot(x, y, ".", color=style["color"], markersize=2, alpha=0.3)


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _label(row: Sequence[Any], task: str) -> None:
    titles = ["held-out success", "entropy (nats per token)", "positive less negative advantages"]
    titles += ["gradient norm against entropy", "measured against predicted drift"]
    for axes, title in zip(row, titles, strict=True):
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if not any(np.isfinite(np.asarray(line.get_ydata(), np.float64)).any() for line in axes.lines):
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color="gray")
    for axes in row[:3]:
        axes.set_xlabel("update", fontsize=9)
    row[0].set_ylim(0, 1)
    row[0].set_ylabel(as_label(task), fontsize=10)
    row[3].set_xlabel("entropy", fontsize=9)
    row[4].set_xlabel("predicted", fontsize=9)


def _legend(figure: Any, grid: Iterable[Any]) -> None:
    """One legend for all panels: an arm may have no run on some tasks."""
    found: dict[str, Any] = {}
    for axes in grid:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    if found:
        place = {"loc": "outside lower center", "ncols": min(6, len(found)), "frameon": False}
        figure.legend(found.values(), found.keys(), **place)
