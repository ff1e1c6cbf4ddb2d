"""Runs beside each other: which arms they form, and what the seeds of an arm say about each measure."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from empg_jax.algorithms.keys import flatten
from empg_jax.config.load import describe
from empg_jax.errors import ConfigError
from empg_jax.metrics import read_metrics
from empg_jax.report.curves import column, held_out_groups, held_out_points
from empg_jax.report.record import has_results
from empg_jax.report.statistics import Difference, area, bootstrap, compare, interquartile_mean

# Keys that may differ between the runs of one arm.
APART = (
    "name",
    "seed",
    "run_dir",
    "compile_cache",
    "log.",
    "checkpoint.",
    "hosts.",
    "train.profile",
    "model.chat_date",
)
FIRST = ("algorithm.entry_point", "algorithm.modulation", "algorithm.name")  # in the names of arms
# Measure -> (metric, how its updates become one number).
LAST, WHOLE, AREA = "mean of the last tenth", "mean over all updates", "area under the curve"
MEASURES = {
    "held-out success, area": ("held_out", AREA),
    "held-out success, end": ("held_out", "last point"),
    "success, area": ("success_rate", AREA),
    "success, end": ("success_rate", LAST),
    "return, area": ("episode_return", AREA),
    "return, end": ("episode_return", LAST),
    "entropy, end": ("entropy", LAST),
    "turns, end": ("episode_turns", LAST),
    "lag": ("lag", WHOLE),
    "tokens per second": ("tokens_per_second", WHOLE),
    "modulation, mean": ("modulation_mean", WHOLE),
    "modulation, sd": ("modulation_std", WHOLE),
    "positive advantages": ("advantage_positive", WHOLE),
    "negative advantages": ("advantage_negative", WHOLE),
    "KL to the reference": ("kl", WHOLE),
    "KL of an update": ("approx_kl", WHOLE),
    "gradient norm": ("grad_norm", WHOLE),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One run: folder, seed, last recorded update, settings, and metrics as (update, value) pairs by name.

    ``is_finished`` is true where its summary is that of all updates that its configuration asks for. Settings
    whose keys are free (``env.options``) are one value.
    """

    folder: Path
    seed: int | None
    updates: int
    is_finished: bool
    settings: dict[str, Any]
    series: dict[str, list[tuple[int, float]]]

    @property
    def planned(self) -> float:
        """The updates that the run is to make; infinity where its configuration does not say it."""
        updates = self.settings.get("train.updates")
        return updates if isinstance(updates, int) else math.inf


@dataclasses.dataclass(frozen=True)
class Line:
    """What the seeds of an arm say of a measure; the interval is a 95 % bootstrap of the mean over seeds."""

    measure: str
    arm: str
    seeds: int
    mean: float
    iqm: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Pairing:
    """The differences of an arm from the first one in a measure, paired by seed."""

    measure: str
    arm: str
    against: str
    difference: Difference


def read_run(folder: Path, *, warn: Callable[[str], None] = lambda line: None) -> Run:
    """Read configuration and metrics of a run.

    Args:
      folder: the run's folder.
      warn: told of damaged lines, which are left out.

    Raises:
      ConfigError: the folder holds no run with metrics.
    """
    try:
        records = read_metrics(folder / "metrics.jsonl", warn=warn)
        found = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no configuration")
        settings = flatten(found, whole=_tables())
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or "not readable"
        raise ConfigError(
            f"{folder} is no run to compare: config.yaml and metrics.jsonl are needed ({reason})"
        ) from None
    if not records:
        raise ConfigError(f"{folder} has no line of metrics yet: nothing can be compared")
    names = {name for record in records for name in record} - {"update", "time"}
    series = {name: _pairs(*column(records, name)) for name in names}
    try:
        series["held_out"] = list(held_out_points(folder, records).items())
        for name in held_out_groups(folder):
            series[name] = list(held_out_points(folder, records, name).items())
    except (ValueError, TypeError, AttributeError):  # a summary.json of which a part is missing
        series.setdefault("held_out", [])
    seed = settings.get("seed")
    updates = max(record["update"] for record in records)
    is_finished = has_results(folder, settings.get("train.updates"))
    return Run(folder, seed if isinstance(seed, int) else None, updates, is_finished, settings, series)


def find_unfinished(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Find the runs without the results of their own ``train.updates``.

    A run whose configuration does not say how many they are is measured by the longest one. The curve of one
    that was cut off, or still trains, ends where the others have yet to rise; without the last evaluation it
    lacks its last point. Such a run counts in no measure, unless there is no finished one: then those that
    got as far as the longest are compared.

    Returns:
      ``(unfinished, left out)``: the runs that are short, and those of them that count in no measure.
    """
    longest = max(run.updates for run in runs)
    short = [
        run for run in runs if not (run.updates == longest if run.planned == math.inf else run.is_finished)
    ]
    is_any_finished = len(short) < len(runs)
    return short, short if is_any_finished else [run for run in short if run.updates < longest]


def name_arms(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Put the runs with equal settings into arms, named after the settings that differ between arms.

    The algorithm and its modulation come first. A modulation's own settings are compared among the runs that
    use it; settings that are null have no part in a name. A key that a run of another version of the program
    lacks counts with its default of today; one that is gone is compared among the runs that have it.
    """
    defaults = {key: default for key, default, _ in describe()}
    # In these tables a key that is lacking is a setting, too.
    tables = tuple(f"{key}." for key in _tables())
    kept = [_compared(flatten(defaults | run.settings)) for run in runs]
    keys = sorted({key for settings in kept for key in settings}, key=lambda key: (key not in FIRST, key))
    differ = [
        key
        for key in keys
        if len({repr(each.get(key)) for each in kept if key in each or key.startswith(tables)}) > 1
    ]
    arms: dict[str, list[Run]] = {}
    for run, settings in zip(runs, kept, strict=True):
        parts = [
            f"{key.removeprefix('algorithm.')}={settings[key]}"
            for key in differ
            if settings.get(key) is not None
        ]
        arms.setdefault(", ".join(parts) or _algorithm(run.settings), []).append(run)
    return arms


def _algorithm(settings: Mapping[str, Any]) -> str:
    """Return the name of the algorithm with its modulation; of one's own, which has none, its entry point."""
    name = settings.get("algorithm.name") or settings.get("algorithm.entry_point") or "all runs"
    kind = settings.get("algorithm.modulation")
    return f"{name}_{kind}" if kind in ("empg", "aem") else str(name)


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what may differ within an arm, and the settings of a modulation that is not used."""
    left_out = (*APART, *_idle(settings))
    return {key: value for key, value in settings.items() if not key.startswith(left_out)}


def _idle(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the settings of the modulations that are not used begin with."""
    used = settings.get("algorithm.modulation")
    return tuple(f"algorithm.{kind}." for kind in ("empg", "aem") if kind != used)


def measure(run: Run, metric: str, how: str) -> float:
    """Reduce a metric of a run to one number; NaN where it was not recorded."""
    points = [(update, value) for update, value in run.series.get(metric, ()) if math.isfinite(value)]
    if not points:
        return math.nan
    if how == AREA:
        return area(points)
    values = [value for _, value in points]
    if how == LAST:
        values = values[-max(1, len(values) // 10) :]
    return values[-1] if how == "last point" else float(np.mean(values))


def summarize(arms: Mapping[str, Sequence[Run]]) -> tuple[list[Line], list[Pairing]]:
    """Compute every measure for every arm, and the differences of the arms from the first one.

    Measures that no run recorded are left out; the success in each group of tasks and the seconds of each
    phase are measures, too.
    """
    measures = MEASURES | {
        f"held-out success of {name.removeprefix('eval_success/')}, end": (name, "last point")
        for name in _named(arms, "eval_success/")
    }
    measures |= {
        f"success of {name.removeprefix('success/')}, end": (name, LAST) for name in _named(arms, "success/")
    }
    measures |= {
        f"{name.removeprefix('seconds_')}, seconds": (name, WHOLE) for name in _named(arms, "seconds_")
    }
    first = next(iter(arms))
    lines, pairings = [], []
    for name, (metric, how) in measures.items():
        found = {arm: _by_seed(runs, metric, how) for arm, runs in arms.items()}
        for arm, values in found.items():
            known = np.array(list(values.values()))
            if len(known):
                low, high = bootstrap([known])
                iqm = float(interquartile_mean(known))
                lines.append(Line(name, arm, len(known), float(known.mean()), iqm, low, high))
        for arm in list(arms)[1:]:
            differences = _paired(found[arm], found[first])
            if len(differences):
                pairings.append(Pairing(name, arm, first, compare([differences])))
    return lines, pairings


def _by_seed(runs: Sequence[Run], metric: str, how: str) -> dict[int | Path, float]:
    """Measure each seed where it is known; runs that repeat a seed are one value, their mean.

    Runs without a seed count each for itself, under its folder.
    """
    found = collections.defaultdict[int | Path, list[float]](list)
    for run in sorted(runs, key=lambda run: (run.seed is None, run.seed or 0, str(run.folder))):
        value = measure(run, metric, how)
        if not math.isnan(value):
            found[run.folder if run.seed is None else run.seed].append(value)
    return {seed: float(np.mean(values)) for seed, values in found.items()}


def _paired(values: Mapping[int | Path, float], others: Mapping[int | Path, float]) -> np.ndarray:
    """Subtract within pairs of equal seeds."""
    return np.array([values[s] - others[s] for s in values if isinstance(s, int) and s in others])


def _named(arms: Mapping[str, Sequence[Run]], prefix: str) -> list[str]:
    names = {name for runs in arms.values() for run in runs for name in run.series}
    return sorted(name for name in names if name.startswith(prefix))


def _pairs(updates: np.ndarray, values: np.ndarray) -> list[tuple[int, float]]:
    return list(zip(updates.tolist(), values.tolist(), strict=True))


def _tables() -> set[str]:
    """Return the settings whose keys are free."""
    return {key for key, default, _ in describe() if isinstance(default, dict)}
