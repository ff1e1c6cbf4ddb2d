"""Estimates over held-out tasks with several attempts each: mean@k, pass@k, and their 95 % intervals.

The task is the unit: attempts at one task are alike, so they never count as independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from empg_jax.report.statistics import FEWEST, bootstrap
from empg_jax.report.summary import wilson_interval

RESAMPLES = 4000


def pass_at_k(attempts: int, successes: int, k: int) -> float:
    """Estimate without bias the chance that one of ``k`` attempts at a task succeeds.

    It is the share of all choices of ``k`` among the attempts that hold a success (Chen et al., 2021).

    Raises:
      ValueError: there are fewer attempts than ``k``.
    """
    if attempts < k:
        raise ValueError(f"pass@{k} needs {k} attempts, not {attempts}")
    return 1.0 - math.comb(attempts - successes, k) / math.comb(attempts, k)


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """Average one value in [0, 1] per task, with the 95 % interval of the mean over tasks.

    Where every task was solved or not (one attempt each, or pass@k of k attempts), the interval is Wilson's.
    Shares between 0 and 1 are resampled task by task. Where fewer than six tasks differ from the most common
    share, resampling would give an interval of too little width, or of none; then Wilson's formula takes the
    mean as if each task were one trial, which is wider than the truth, not narrower.

    Returns:
      ``value``, ``interval`` (low, high), ``method`` (``wilson`` or ``bootstrap``), ``tasks``.

    Raises:
      ValueError: there is no task.
    """
    if not values:
        raise ValueError("an estimate needs at least one task")
    shares = np.asarray(values, np.float64)
    mean, tasks = float(shares.mean()), len(shares)
    is_proportion = bool(np.isin(shares, (0.0, 1.0)).all())
    counts = np.unique(shares.round(12), return_counts=True)[1]
    if is_proportion or tasks - counts.max() < FEWEST:
        low, high = wilson_interval(mean * tasks, tasks)
        method = "wilson"
    else:
        low, high = bootstrap([shares], resamples=RESAMPLES)  # of means of shares, so in [0, 1]
        method = "bootstrap"
    return {
        "value": round(mean, 6),
        "interval": [round(low, 6), round(high, 6)],
        "method": method,
        "tasks": tasks,
    }


def sizes_up_to(attempts: int) -> list[int]:
    """List the ``k`` that pass@k is told for: powers of two, and all attempts."""
    return sorted({2**power for power in range(attempts.bit_length()) if 2**power <= attempts} | {attempts})
