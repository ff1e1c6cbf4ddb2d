"""The runs of a study as numbers: which count, which pairs are left out and why, and what they say."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from study_ledger import Line, newest
from study_plan import Study, Triple

from empg_jax.report.statistics import Difference, bootstrap, compare, correlation, holm, interquartile_mean


@dataclasses.dataclass(frozen=True)
class Results:
    """The finished runs of a study, and those that are not there.

    Attributes:
      study: the study.
      finished: the line of each finished run.
      failed: the line of each run that failed and was not made since.
      missing: runs without a line.
      strangers: lines of tasks, arms or seeds that the study's file does not name.
      apart: finished runs that do not count, since another arm of their task and seed has not finished
        (`Study.whole_seeds`).
      excluded: pairs that do not count, by task, seed and arms, with the reason.
    """

    study: Study
    finished: dict[Triple, Line]
    failed: dict[Triple, Line]
    missing: list[Triple]
    strangers: int
    apart: list[Triple]
    excluded: dict[tuple[str, int, str, str], str]

    def values(self, task: str, arm: str, key: str) -> np.ndarray:
        """The values of a measure over the seeds of a cell, in the study's order."""
        return np.array([line[key] for line in self.lines(task, arm)], np.float64)

    def lines(self, task: str, arm: str) -> list[Line]:
        """The finished runs of a cell, in the study's order of seeds."""
        found = (self.finished.get(Triple(task, arm, seed)) for seed in self.study.seeds)
        return [line for line in found if line is not None]

    def differences(self, task: str, arm: str, against: str, key: str) -> np.ndarray:
        """The differences of a measure over the pairs of a task that count."""
        found = []
        for seed in self.study.seeds:
            pair = [self.finished.get(Triple(task, each, seed)) for each in (arm, against)]
            if None not in pair and (task, seed, arm, against) not in self.excluded:
                found.append(pair[0][key] - pair[1][key])
        return np.array(found, np.float64)


@dataclasses.dataclass(frozen=True)
class Cell:
    """What the seeds of one arm say on one task; NaN where nothing is known."""

    runs: int
    area: float
    area_interval: tuple[float, float]
    area_iqm: float
    start: float
    end: float
    end_interval: tuple[float, float]
    reached: int
    updates_to_60: float
    wall_seconds: float
    cpu_seconds: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One difference of two arms, on one task or pooled over several (``task`` is None), those with pairs."""

    task: str | None
    tasks: tuple[str, ...]
    arm: str
    against: str
    difference: Difference
    adjusted: float


def gather(study: Study, lines: Sequence[Line]) -> Results:
    """Sort the lines of a study; the last one of each run counts."""
    last, wanted = newest(list(lines)), list(study.triples())
    known = {triple: last[triple] for triple in wanted if triple in last}
    done = {triple: line for triple, line in known.items() if line["status"] == "finished"}
    apart = [triple for triple in done if study.whole_seeds and not _is_whole(study, done, triple)]
    finished = {triple: line for triple, line in done.items() if triple not in apart}
    return Results(
        study,
        finished,
        failed={triple: line for triple, line in known.items() if triple not in done},
        missing=[triple for triple in wanted if triple not in known],
        strangers=len(last.keys() - set(wanted)),
        apart=apart,
        excluded=_exclude(study, finished),
    )


def _is_whole(study: Study, done: Mapping[Triple, Line], triple: Triple) -> bool:
    return all(Triple(triple.task, arm, triple.seed) in done for arm in study.arms)


def _exclude(study: Study, finished: Mapping[Triple, Line]) -> dict[tuple[str, int, str, str], str]:
    """Exclude pairs of which a run is not there, and those that differ in more than the arm."""
    found = {}
    for task in study.tasks:
        for seed in study.seeds:
            for pair in study.comparisons:
                there = [arm for arm in pair if Triple(task, arm, seed) in finished]
                if len(there) == 1:
                    (absent,) = set(pair) - set(there)
                    found[task, seed, *pair] = f"no finished run of {absent}"
                elif len(there) == 2:
                    runs = [finished[Triple(task, arm, seed)] for arm in pair]
                    starts = [run["weights_before"] for run in runs]
                    if starts[0] != starts[1]:
                        found[task, seed, *pair] = f"the weights before RL differ ({', '.join(starts)})"
                    elif runs[0]["end_tasks"] != runs[1]["end_tasks"]:
                        found[task, seed, *pair] = "their last panels differ in size"
                    elif any(runs[0][key] != runs[1][key] for key in ("commits", "versions")):
                        found[task, seed, *pair] = "they are of different commits or versions of packages"
                    elif (runs[0].get("changes") or []) != (runs[1].get("changes") or []):
                        found[task, seed, *pair] = "they are of different code that is not committed"
    return found


def describe_cell(results: Results, task: str, arm: str) -> Cell | None:
    """Describe the runs of one arm on one task; None without any."""
    lines = results.lines(task, arm)
    if not lines:
        return None
    areas, ends = (results.values(task, arm, key) for key in ("area", "end_success"))
    reached = [line["updates_to_60"] for line in lines if line["updates_to_60"] is not None]
    times = [*sorted(reached), *[math.inf] * (len(lines) - len(reached))]
    return Cell(
        runs=len(lines),
        area=float(areas.mean()),
        area_interval=bootstrap([areas]),
        area_iqm=float(interquartile_mean(areas)),
        start=float(np.mean([line["curve"][0][1] for line in lines])),
        end=float(ends.mean()),
        end_interval=bootstrap([ends]),
        reached=len(reached),
        updates_to_60=(times[(len(times) - 1) // 2] + times[len(times) // 2]) / 2,
        wall_seconds=_mean([line["wall_seconds"] for line in lines]),
        cpu_seconds=_mean([line["cpu_seconds"] for line in lines]),
    )


def compare_arms(results: Results, key: str) -> list[Comparison]:
    """Compare the study's pairs of arms in a measure, on each task and pooled over tasks.

    Holm's correction is over the study's comparisons pooled over tasks, and apart from that over all of them
    on single tasks; those that have no pair yet count, too.
    """
    study = results.study
    by_task = {
        (task, *pair): results.differences(task, *pair, key)
        for task in study.tasks
        for pair in study.comparisons
    }
    single = {where: compare([values], len(by_task)) for where, values in by_task.items()}
    with_pairs = {
        pair: tuple(task for task in study.tasks if len(by_task[task, *pair])) for pair in study.comparisons
    }
    overall = study.only_task
    pooled = {
        (overall, *pair): compare([by_task[task, *pair] for task in study.tasks], len(study.comparisons))
        for pair in study.comparisons
    }
    families = [pooled] if len(study.tasks) == 1 else [pooled, single]
    return [
        Comparison(task, with_pairs[arm, against], arm, against, difference, adjusted)
        for family in families
        for ((task, arm, against), difference), adjusted in zip(
            family.items(), holm([each.p for each in family.values()]), strict=True
        )
    ]


def mean_of_part(line: Line, name: str, part: Callable[[int], slice]) -> float:
    """The mean of a series over a part of the updates; NaN where it was not recorded."""
    values = line["series"][name]
    return _mean(values[part(len(values))])


def correlation_of(line: Line, first: str, second: str) -> float:
    """The correlation of two series of a run."""
    return correlation(line["series"][first], line["series"][second])


def average(values: Sequence[float]) -> float:
    """The mean of the values that are known; NaN without any."""
    return _mean(values)


def _mean(values: Sequence[Any]) -> float:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
