"""The compute-matched panel of a study: curves read at equal environment steps and at equal CPU seconds.

The budget of a task is what its thriftiest finished run spent, so that every curve reaches it. Seconds of one
machine say nothing of another's: each machine has a budget of its own, and only pairs of runs on one machine
count. Up to the budget a run is worth the area under its held-out curve over what it spent, and it stands
where the curve crosses the budget.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Container, Mapping, Sequence

import numpy as np
from study_ledger import Line
from study_line import SPENT
from study_plan import Study, Triple
from study_results import Comparison, Results, compare_arms

from empg_jax.report.statistics import area, bootstrap

AMOUNTS = {"environment_steps": "environment steps", "cpu_seconds": "CPU seconds"}
assert tuple(AMOUNTS) == SPENT


@dataclasses.dataclass(frozen=True)
class Matched:
    """A study's runs at equal amounts.

    Attributes:
      results: by amount, the runs that count; their lines have ``area_AMOUNT``, ``at_AMOUNT``.
      budgets: what runs are compared at, by task, amount and place (`place_of`).
      silent: finished runs whose record does not say what they spent.
      alone: runs that do not count over CPU seconds, since they have no pair that counts.
      unlike: pairs on different processors or numbers of cores, whose CPU seconds cannot be compared.
    """

    results: dict[str, Results]
    budgets: dict[tuple[str, str, str], float]
    silent: list[Triple]
    alone: list[Triple]
    unlike: dict[tuple[str, int, str, str], str]

    def differences(self, amount: str) -> dict[tuple[str | None, str, str], Comparison]:
        """Compare the arms' areas up to the budget, by task (None: pooled) and arms."""
        found = compare_arms(self.results[amount], f"area_{amount}")
        return {(each.task, each.arm, each.against): each for each in found}

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
    unlike = _find_unlike(results.study, told)
    excluded = results.excluded | unlike
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
    )


def place_of(line: Line, amount: str) -> str:
    """The machine on which a run's seconds were spent; environment steps are the same everywhere."""
    hardware = line["hardware"]
    return f"{hardware['cpus']} x {hardware['processor']}" if amount == "cpu_seconds" else ""


def _find_unlike(study: Study, told: Mapping[Triple, Line]) -> dict[tuple[str, int, str, str], str]:
    found = {}
    for task, seed, pair in itertools.product(study.tasks, study.seeds, study.comparisons):
        lines = [told.get(Triple(task, arm, seed)) for arm in pair]
        machines = [place_of(line, "cpu_seconds") for line in lines if line]
        if len(set(machines)) > 1:
            found[task, seed, *pair] = " and ".join(machines)
    return found


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
