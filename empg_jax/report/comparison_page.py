"""``empg-jax report``: the comparison of runs as one page, one picture and one table."""

from __future__ import annotations

import base64
import csv
import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from empg_jax.errors import ConfigError, writing
from empg_jax.files import replacing, write_text_atomic
from empg_jax.report.comparison import Line, Pairing, Run, find_unfinished, name_arms, read_run, summarize
from empg_jax.report.curves import as_label, smooth
from empg_jax.report.statistics import band

PANELS = {
    "held_out": "held-out success",
    "success_rate": "success",
    "episode_return": "episode return",
    "entropy": "entropy (nats per token)",
    "episode_turns": "turns per episode",
    "modulation_std": "modulation factor, sd",
    "advantage_positive": "share of positive advantages",
    "grad_norm": "gradient norm",
    "approx_kl": "KL of an update",
    "tokens_per_second": "tokens per second",
    "lag": "lag (updates)",
    "seconds_cycle": "seconds per update",
}
RESAMPLES = 500  # of a band in the picture; the table's intervals take more
STYLE = """:root { color-scheme: light dark; } body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem;
margin: 1rem auto; padding: 0 1rem; } table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { border-bottom: 1px solid #8886; padding: .15rem .7rem; text-align: right;
font-variant-numeric: tabular-nums; } th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
img { max-width: 100%; background: #fff; }"""


def report_runs(folders: Sequence[Path], out: Path, *, warn: Callable[[str], None]) -> Path:
    """Compare runs; write ``report.html``, ``report.png`` and ``report.csv`` into a folder.

    Unfinished runs are drawn and named; `find_unfinished` says which of them are left out of all numbers.

    Args:
      folders: folders of runs. Runs with equal settings but another seed form an arm; the arm of the first
        run is what the others are compared with.
      out: the folder to write into; it is made.
      warn: told of each run that is not finished, and of damaged lines.

    Returns:
      The path of ``report.html``.

    Raises:
      ConfigError: a folder holds no run with metrics or is named twice, or ``out`` cannot be written.
    """
    for place, folder in enumerate(folders):
        if any(folder.resolve() == other.resolve() for other in folders[:place]):
            raise ConfigError(f"{folder} is named twice: a run counts once, or its intervals would shrink")
    notes: list[str] = []
    runs = [read_run(folder, warn=notes.append) for folder in folders]
    arms, (unfinished, left_out) = name_arms(runs), find_unfinished(runs)
    lines, pairings = summarize(
        {arm: [run for run in each if run not in left_out] for arm, each in arms.items()}
    )
    notes += [
        f"{run.folder} is not finished ({_progress(run)} updates{_missing(run)}): "
        + ("it is drawn, and left out of all numbers" if run in left_out else "no run is, so it is compared")
        for run in unfinished
    ]
    for line in notes:
        warn(line)
    picture = draw(arms)
    page = as_html(arms, notes, lines, pairings, picture)
    with writing(f"--out {out}", ConfigError):
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / "report.png") as file:
            file.write(picture)
        write_text_atomic(out / "report.csv", as_csv(lines, pairings))
        write_text_atomic(out / "report.html", page)
    return out / "report.html"


def as_csv(lines: Sequence[Line], pairings: Sequence[Pairing]) -> str:
    """Format the numbers as CSV; a line with ``against`` is a paired difference."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["measure", "arm", "against", "runs", "mean", "iqm", "low", "high", "p"])
    for line in lines:
        numbers = [line.mean, line.iqm, line.low, line.high]
        writer.writerow([line.measure, line.arm, "", line.seeds, *map(_cell, numbers), ""])
    for pair in pairings:
        found = pair.difference
        row = [pair.measure, pair.arm, pair.against, found.pairs, _cell(found.mean), ""]
        writer.writerow([*row, *map(_cell, (found.low, found.high, found.p))])
    return text.getvalue()


def as_html(
    arms: Mapping[str, Sequence[Run]],
    notes: Sequence[str],
    lines: Sequence[Line],
    pairings: Sequence[Pairing],
    picture: bytes,
) -> str:
    """Format the comparison, with notes on unfinished runs, as one page that stands alone."""
    runs = [
        [
            arm,
            str(len(each)),
            ", ".join(str(run.seed) for run in each),
            ", ".join(map(_progress, each)),
            ", ".join(run.folder.name for run in each),
        ]
        for arm, each in arms.items()
    ]
    means = [
        [
            line.measure,
            line.arm,
            str(line.seeds),
            _show(line.mean),
            _bounds(line.low, line.high),
            _show(line.iqm),
        ]
        for line in lines
    ]
    differences = [
        [
            *(pair.measure, f"{pair.arm} - {pair.against}", str(pair.difference.pairs)),
            *(_show(pair.difference.mean), _bounds(pair.difference.low, pair.difference.high)),
            _show(pair.difference.p),
        ]
        for pair in pairings
    ]
    shown = base64.b64encode(picture).decode()
    note = (
        "Means over seeds, with 95 % bootstrap intervals from six seeds on, and interquartile means; runs "
        "that repeat a seed count as one. Bands in the picture are such intervals, of fewer than six runs "
        "their range. Differences are paired by seed; p is that of the exact sign-flip test, of one measure "
        "each, not corrected for their number."
    )
    parts = [
        _table(["arm", "runs", "seeds", "updates", "folders"], runs),
        *(f"<p>{html.escape(line)}</p>" for line in notes),
        f"<p>{note}</p>",
        f'<img alt="Curves of the arms over updates" src="data:image/png;base64,{shown}">',
        "<h2>Measures</h2>" + _table(["measure", "arm", "seeds", "mean", "interval", "IQM"], means),
    ]
    if differences:
        heads = ["measure", "difference", "pairs", "mean", "interval", "p"]
        parts.append("<h2>Paired differences</h2>" + _table(heads, differences))
    elif len(arms) > 1:
        told = "No two arms share a seed among the runs that count, so there are no paired differences."
        parts.append(f"<p>{told}</p>")
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>Comparison of runs</title><style>{STYLE}</style>'
    page = f"<body><h1>Comparison of runs</h1>\n{body}</body>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>{page}</html>\n'


def draw(arms: Mapping[str, Sequence[Run]]) -> bytes:
    """Draw the mean of each arm over updates with its band; return a PNG."""
    # Figure without pyplot, which has global state and may need a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 10), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 4).flat
    for (name, title), each in zip(PANELS.items(), axes, strict=True):
        drawn = [_draw_arm(each, runs, name, arm, f"C{k % 10}") for k, (arm, runs) in enumerate(arms.items())]
        each.set_title(title, loc="left", fontsize=10)
        each.xaxis.get_major_locator().set_params(integer=True)
        each.grid(alpha=0.25)
        if not any(drawn):
            each.text(0.5, 0.5, "not recorded", transform=each.transAxes, ha="center", color="gray")
    handles = {
        label: handle
        for each in figure.axes
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=1, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=90, metadata={"Software": None})
    return content.getvalue()


def _draw_arm(axes: Any, runs: Sequence[Run], name: str, arm: str, color: str) -> bool:
    curves = [dict(run.series.get(name, ())) for run in runs if run.series.get(name)]
    updates = sorted({update for curve in curves for update in curve})
    table = np.array([[curve.get(update, np.nan) for curve in curves] for update in updates])
    is_known = np.isfinite(table)
    if not is_known.any():
        return False
    sums, counts = np.where(is_known, table, 0.0).sum(axis=1), is_known.sum(axis=1)
    means = np.divide(sums, counts, out=np.full(len(updates), np.nan), where=counts > 0)
    width = 1 if name == "held_out" else max(1, len(updates) // 20)
    line = {"color": color, "label": as_label(arm), "linewidth": 1.6, "markersize": 3}
    axes.plot(updates, smooth(means, width), ".-", **line)
    whole = is_known.all(axis=1)
    if len(curves) > 1 and whole.any():
        bands = np.array([band(row, RESAMPLES) for row in table[whole]])
        low, high = (smooth(bound, min(width, len(bound))) for bound in bands.T)
        axes.fill_between(np.array(updates)[whole], low, high, color=color, alpha=0.15, linewidth=0)
    return True


def _progress(run: Run) -> str:
    is_short = run.updates < run.planned < math.inf
    return f"{run.updates} of {run.planned}" if is_short else str(run.updates)


def _missing(run: Run) -> str:
    return ", without the evaluation after them" if run.updates == run.planned else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{html.escape(head)}</th>' for head in heads)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table>"


def _cell(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _show(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _bounds(low: float, high: float) -> str:
    return "-" if math.isnan(low) else f"[{low:.4g}, {high:.4g}]"
