"""The compute-matched panel of a study: curves read at equal environment steps and at equal CPU seconds.

The budget of a task is what its thriftiest finished run spent, so that every curve reaches it. Up to there a
run is worth the area under its held-out curve over what it spent, and it stands where the curve crosses the
budget.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

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
      results: the runs whose record says what they spent; their lines have ``area_AMOUNT``, ``at_AMOUNT``.
      budgets: what the runs of a task are compared at, by task and amount.
      silent: finished runs whose record does not say it.
      unlike: pairs on different processors or numbers of cores, whose CPU seconds cannot be compared.
    """

    results: Results
    budgets: dict[tuple[str, str], float]
    silent: list[Triple]
    unlike: dict[tuple[str, int, str, str], str]

    def differences(self, amount: str) -> dict[tuple[str | None, str, str], Comparison]:
        """Compare the arms' areas up to the budget, by task (None: pooled) and arms."""
        results = self.results
        if amount == "cpu_seconds":
            results = dataclasses.replace(results, excluded=results.excluded | self.unlike)
        found = compare_arms(results, f"area_{amount}")
        return {(each.task, each.arm, each.against): each for each in found}

    def describe(self, task: str, arm: str, key: str) -> tuple[float, tuple[float, float]]:
        """The mean of a measure over the seeds of a cell, and its interval."""
        values = self.results.values(task, arm, key)
        return float(values.mean()), bootstrap([values])


def match(results: Results) -> Matched | None:
    """Read all curves at equal amounts; None where no run says what it spent."""
    told = {triple: line for triple, line in results.finished.items() if line.get("spent") is not None}
    if not told:
        return None
    budgets = {
        (task, amount): min(line["spent"][amount][-1] for triple, line in told.items() if triple.task == task)
        for task in {triple.task for triple in told}
        for amount in AMOUNTS
    }
    lines = {triple: line | _measure(line, triple.task, budgets) for triple, line in told.items()}
    return Matched(
        dataclasses.replace(results, finished=lines),
        budgets,
        silent=[triple for triple in results.finished if triple not in told],
        unlike=_find_unlike(results.study, told),
    )


def _find_unlike(study: Study, told: Mapping[Triple, Line]) -> dict[tuple[str, int, str, str], str]:
    found = {}
    for task, seed, pair in itertools.product(study.tasks, study.seeds, study.comparisons):
        lines = [told.get(Triple(task, arm, seed)) for arm in pair]
        machines = [f"{line['hardware']['cpus']} x {line['hardware']['processor']}" for line in lines if line]
        if len(set(machines)) > 1:
            found[task, seed, *pair] = " and ".join(machines)
    return found


def _measure(line: Line, task: str, budgets: Mapping[tuple[str, str], float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for amount in AMOUNTS:
        cut = cut_at(line["spent"][amount], [value for _, value in line["curve"]], budgets[task, amount])
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
