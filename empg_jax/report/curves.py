"""Learning curves: one PNG with eight panels, drawn from ``metrics.jsonl`` and ``summary.json`` of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from empg_jax.files import replacing
from empg_jax.metrics import read_metrics
from empg_jax.report.statistics import finite

CURVES = "curves.png"  # in the run's folder
TRAIN, HELD_OUT = "#1f6f8b", "#c8553d"


def plot_curves(run_dir: Path) -> Path:
    """Draw what a run did over its updates, and in a second row the credit and what it led to.

    The panel of a metric that was not recorded says so. Values that are not finite leave a gap.

    Returns:
      The path of ``curves.png`` in the run's folder.

    Raises:
      FileNotFoundError: the folder has no ``metrics.jsonl``.
    """
    # Figure without pyplot, which has global state and may need a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    run_dir = Path(run_dir)
    records = read_metrics(run_dir / "metrics.jsonl")
    figure = Figure(figsize=(16, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 4).flat
    _success(next(panels), records, held_out_points(run_dir, records))
    _line(next(panels), records, "episode_return", "episode return")
    _line(next(panels), records, "entropy", "entropy (nats per token)", floor=0.0)
    _line(next(panels), records, "episode_turns", "turns per episode", floor=0.0)
    _modulation(next(panels), records)
    _balance(next(panels), records)
    _line(next(panels), records, "grad_norm", "gradient norm", floor=0.0)
    _line(next(panels), records, "loss", "loss")
    figure.suptitle(as_label(run_dir.resolve().name))
    path = run_dir / CURVES
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
    return path


def as_label(name: str) -> str:
    """Return a name as a picture's label: between two dollars matplotlib would read mathematics."""
    return name.replace("$", r"\$")


def column(records: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the updates and values of one metric where it was recorded; what is no number becomes NaN."""
    pairs = [(record["update"], finite(record[name])) for record in records if name in record]
    updates = np.array([update for update, _ in pairs], dtype=np.int64)
    values = np.array([np.nan if value is None else value for _, value in pairs], dtype=np.float64)
    return updates, values


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Compute a centered mean over ``width`` values, over fewer at the ends and around gaps."""
    known = np.isfinite(values)
    kernel = np.ones(width)
    sums = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    counts = np.convolve(known.astype(np.float64), kernel, mode="same")
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def held_out_points(
    run_dir: Path, records: Sequence[dict[str, Any]], metric: str = "eval_success"
) -> dict[int, float]:
    """Collect an ``eval_*`` metric, by default the success, by update: before, during and after training."""
    updates, values = column(records, metric)
    points = dict(zip(updates.tolist(), values.tolist(), strict=True))
    path = run_dir / "summary.json"
    if path.exists():
        summary = json.loads(path.read_text(encoding="utf-8"))
        for when, update in (("before", 0), ("after", summary.get("updates", 0))):
            if summary.get(f"{metric}_{when}") is not None:
                points[update] = summary[f"{metric}_{when}"]
    return dict(sorted(points.items()))


def held_out_groups(run_dir: Path) -> list[str]:
    """List the metrics ``eval_success/GROUP`` of a run's summary, sorted."""
    path = run_dir / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return sorted(
        name.removesuffix("_after")
        for name in summary
        if name.startswith("eval_success/") and name.endswith("_after")
    )


def _success(axes: Any, records: Sequence[dict[str, Any]], held_out: dict[int, float]) -> None:
    recorded = _draw(axes, records, "success_rate", "train")
    if held_out:
        line = {"color": HELD_OUT, "markersize": 5, "linewidth": 1}
        axes.plot(list(held_out), list(held_out.values()), "o--", label="held out", **line)
    axes.set_ylim(-0.02, 1.02)
    _finish(axes, "success", recorded or len(held_out) > 0)
    if recorded or held_out:
        _name_curves(axes)


def _name_curves(axes: Any) -> None:
    """Put the legend above the frame, where no curve can run through it, and short, beside the title."""
    short = {"handlelength": 1.1, "handletextpad": 0.4, "columnspacing": 0.9}
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, borderaxespad=0.1, **short
    )


def _modulation(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    recorded = _draw(axes, records, "modulation_mean", "mean")
    lows, highs = column(records, "modulation_min"), column(records, "modulation_max")
    if len(lows[0]) and np.array_equal(lows[0], highs[0]):
        axes.fill_between(lows[0], lows[1], highs[1], color=TRAIN, alpha=0.15, linewidth=0)
    _finish(axes, "modulation factor (mean, range)", recorded)


def _balance(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    up = _draw(axes, records, "advantage_positive", "positive")
    down = _draw(axes, records, "advantage_negative", "negative", color=HELD_OUT)
    if up or down:
        axes.set_ylim(-0.02, 1.02)
        _name_curves(axes)
    _finish(axes, "turns by advantage", up or down)


def _line(
    axes: Any, records: Sequence[dict[str, Any]], name: str, title: str, floor: float | None = None
) -> None:
    recorded = _draw(axes, records, name, name)
    if recorded and floor is not None:
        # Room above: otherwise a curve that starts at its maximum touches the frame.
        axes.set_ylim(floor, max(axes.get_ylim()[1], floor + 1e-3) * 1.05)
    _finish(axes, title, recorded)


def _draw(axes: Any, records: Sequence[dict[str, Any]], name: str, label: str, color: str = TRAIN) -> bool:
    updates, values = column(records, name)
    if not np.isfinite(values).any():
        return False
    width = max(1, len(values) // 20)
    # Points, so that a single update can be seen, and one beside a gap.
    axes.plot(
        updates, values, ".-", color=color, alpha=0.3 if width > 1 else 1.0, linewidth=0.7, markersize=4
    )
    axes.plot(updates, smooth(values, width), color=color, linewidth=2, label=label)
    return True


def _finish(axes: Any, title: str, recorded: bool) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("update", fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if not recorded:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color="gray")
