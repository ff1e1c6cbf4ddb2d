"""The compute-matched panel of a study: curves read at equal environment steps and at equal CPU seconds.

The budget of a task is what its thriftiest finished run spent, so that every curve reaches it. Seconds of one
machine say nothing of another's: each machine has a budget of its own, and only pairs of runs on one machine
count. CPU seconds for the same work also grow with the load of a machine, by about 3 % when wall time per CPU
second doubles, so that pairs under different load (`LOAD_RATIO`) do not count either. Up to the budget a run
is worth the area under its held-out curve over what it spent, and it stands where the curve crosses the
budget.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Container, Mapping, Sequence

import numpy as np
from study_ledger import Line
from study_line import SPENT
from study_plan import Study, Triple
from study_results import Comparison, Results, compare_arms

from empg_jax.report.statistics import area, bootstrap

AMOUNTS = {"environment_steps": "environment steps", "cpu_seconds": "CPU seconds"}
assert tuple(AMOUNTS) == SPENT
LOAD_RATIO = 2.0  # the most by which wall time per CPU second may differ in a pair


@dataclasses.dataclass(frozen=True)
class Matched:
    """A study's runs at equal amounts.

    Attributes:
      results: by amount, the runs that count; their lines have ``area_AMOUNT``, ``at_AMOUNT``.
      budgets: what runs are compared at, by task, amount and place (`place_of`).
      silent: finished runs whose record does not say what they spent.
      alone: runs that do not count over CPU seconds, since they have no pair that counts.
      unlike: pairs on different processors or numbers of cores, whose CPU seconds cannot be compared.
      uneven: pairs on one machine whose runs' wall time per CPU second differs by more than `LOAD_RATIO`.
    """

    results: dict[str, Results]
    budgets: dict[tuple[str, str, str], float]
    silent: list[Triple]
    alone: list[Triple]
    unlike: dict[tuple[str, int, str, str], str]
    uneven: dict[tuple[str, int, str, str], str]

    def differences(self, amount: str) -> dict[tuple[str | None, str, str], Comparison]:
        """Compare the arms' areas up to the budget, by task (None: pooled) and arms."""
        found = compare_arms(self.results[amount], f"area_{amount}")
        return {(each.task, each.arm, each.against): each for each in found}

    def load(self, task: str, arm: str) -> float:
        """The median wall time per CPU second of the runs of a cell; NaN where no run has it."""
        loads = map(load_of, self.results["environment_steps"].lines(task, arm))
        known = [load for load in loads if not math.isnan(load)]
        return statistics.median(known) if known else math.nan

    def describe(self, task: str, arm: str, amount: str) -> tuple[float, tuple[float, float], float]:
        """The mean area over the seeds of a cell with its interval, and the mean success at the budget."""
        areas, ends = (self.results[amount].values(task, arm, f"{key}_{amount}") for key in ("area", "at"))
        if not len(areas):
            return math.nan, (math.nan, math.nan), math.nan
        return float(areas.mean()), bootstrap([areas]), float(ends.mean())


def match(results: Results) -> Matched | None:
    """Read all curves at equal amounts; None where no run says what it spent."""
    told = {triple: line for triple, line in results.finished.items() if line.get("spent") is not None}
    if not told:
        return None
    budgets: dict[tuple[str, str, str], float] = {}
    for triple, line in told.items():
        for amount in AMOUNTS:
            key, spent = (triple.task, amount, place_of(line, amount)), line["spent"][amount][-1]
            budgets[key] = min(spent, budgets.get(key, spent))
    lines = {triple: line | _measure(line, triple.task, budgets) for triple, line in told.items()}
    unlike, uneven = _find_unlike(results.study, told)
    excluded = results.excluded | unlike | uneven
    paired = _find_paired(results.study, told, excluded)
    within = {triple: line for triple, line in lines.items() if triple in paired}
    return Matched(
        {
            "environment_steps": dataclasses.replace(results, finished=lines),
            "cpu_seconds": dataclasses.replace(results, finished=within, excluded=excluded),
        },
        budgets,
        silent=[triple for triple in results.finished if triple not in told],
        alone=[triple for triple in told if triple not in paired],
        unlike=unlike,
        uneven=uneven,
    )


def place_of(line: Line, amount: str) -> str:
    """The machine on which a run's seconds were spent; environment steps are the same everywhere."""
    hardware = line["hardware"]
    return f"{hardware['cpus']} x {hardware['processor']}" if amount == "cpu_seconds" else ""


def load_of(line: Line) -> float:
    """Wall time per CPU second of a run, 1 on a core of its own; NaN where it was not recorded."""
    wall, cpu = line.get("process_seconds"), line.get("cpu_seconds")
    return wall / cpu if wall and cpu else math.nan


def _find_unlike(
    study: Study, told: Mapping[Triple, Line]
) -> tuple[dict[tuple[str, int, str, str], str], dict[tuple[str, int, str, str], str]]:
    """Find the pairs on different machines, and those on one machine under different load."""
    unlike, uneven = {}, {}
    for task, seed, pair in itertools.product(study.tasks, study.seeds, study.comparisons):
        lines = [line for arm in pair if (line := told.get(Triple(task, arm, seed)))]
        machines, loads = [place_of(line, "cpu_seconds") for line in lines], [load_of(line) for line in lines]
        if len(set(machines)) > 1:
            unlike[task, seed, *pair] = " and ".join(machines)
        elif len(lines) == 2 and max(loads) > LOAD_RATIO * min(loads):  # never true of NaN
            uneven[task, seed, *pair] = " and ".join(f"{load:.1f}" for load in loads)
    return unlike, uneven


def _find_paired(
    study: Study, told: Mapping[Triple, Line], excluded: Container[tuple[str, int, str, str]]
) -> set[Triple]:
    """Find the runs of the pairs that are there and count."""
    found: set[Triple] = set()
    for task, seed, pair in itertools.product(study.tasks, study.seeds, study.comparisons):
        runs = {Triple(task, arm, seed) for arm in pair}
        if runs <= told.keys() and (task, seed, *pair) not in excluded:
            found |= runs
    return found


def _measure(line: Line, task: str, budgets: Mapping[tuple[str, str, str], float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for amount in AMOUNTS:
        budget = budgets[task, amount, place_of(line, amount)]
        cut = cut_at(line["spent"][amount], [value for _, value in line["curve"]], budget)
        found |= {f"area_{amount}": area(cut), f"at_{amount}": cut[-1][1]}
    return found


def cut_at(spent: Sequence[float], values: Sequence[float], budget: float) -> list[tuple[float, float]]:
    """Cut a curve, linear between its points, off where a budget is spent.

    Args:
      spent: what had been spent at each point, ascending from 0.
      values: the curve there.
      budget: at most what was spent at the last point.
    """
    kept = [(x, y) for x, y in zip(spent, values, strict=True) if x < budget]
    return [*kept, (budget, float(np.interp(budget, spent, values)))]
