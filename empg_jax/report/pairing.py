"""Two evaluations on the same tasks: the paired difference of their success, with exact tests."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from empg_jax.errors import ConfigError
from empg_jax.report.intervals import RESAMPLES
from empg_jax.report.statistics import FEWEST, bootstrap
from empg_jax.report.summary import gain_interval

EPISODES = "episodes.jsonl"  # of an evaluation's folder: one line per attempt
Task = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Tasks:
    """What the episodes of an evaluation say of each task.

    Attributes:
      shares: the share of its attempts that succeed.
      groups: the name of its group, or an empty text.
      begins: the first observation, or None where it is not recorded.
    """

    shares: dict[Task, float]
    groups: dict[Task, str]
    begins: dict[Task, str | None]


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Compare the second evaluation with the first, task by task.

    Args:
      first: folder of an evaluation, or a run that has one.
      second: another.

    Returns:
      ``first`` and ``second`` (the folders), ``unpaired`` (tasks that only one of them has), the numbers of
      `pair` for all tasks, the same for each group of tasks in ``groups``, and in ``notes`` lines on what
      speaks against equal tasks.

    Raises:
      ConfigError: there is no evaluation in a folder, or the two have no task in common, or are of different
        environments or options of it.
    """
    folders = [find_evaluation(path) for path in (first, second)]
    before, after = (read_tasks(folder) for folder in folders)
    tasks = [task for task in before.shares if task in after.shares]
    if not tasks:
        raise ConfigError(f"{folders[0]} and {folders[1]} have no task in common: nothing can be paired")
    begins = [(before.begins[task], after.begins[task]) for task in tasks]
    notes = _check_same_tasks(folders, begins)
    groups = collections.defaultdict(list)
    for task in tasks:
        groups[before.groups[task]].append(task)

    def pair_all(each: Sequence[Task]) -> dict[str, Any]:
        return pair([before.shares[task] for task in each], [after.shares[task] for task in each])

    return {
        "first": str(folders[0]),
        "second": str(folders[1]),
        "unpaired": len(before.shares.keys() ^ after.shares.keys()),
        **pair_all(tasks),
        "groups": {name: pair_all(each) for name, each in sorted(groups.items()) if name},
        "notes": notes,
    }


def pair(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Compute the paired difference of the share of attempts that succeed.

    Where every task was solved or not, the interval is that of `gain_interval`. Shares between 0 and 1 have
    a bootstrap interval over tasks, unless fewer than six tasks changed or all by the same: resampling says
    too little of them, and the first interval, for which a task is one trial, is wider than the truth, not
    narrower. The test is exact (McNemar, the sign test): only tasks that changed carry information, and the
    count of gains among them is binomial.

    Returns:
      ``tasks``, ``success`` (of both), ``gain``, ``interval`` (95 %), ``gained``, ``lost`` (tasks),
      ``p_value`` (two-sided), ``method`` of the interval (``score`` or ``bootstrap``).
    """
    x, y = np.asarray(before, np.float64), np.asarray(after, np.float64)
    change = y - x
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    is_decided = bool(np.isin(np.concatenate([x, y]), (0.0, 1.0)).all())
    if is_decided or gained + lost < FEWEST or np.ptp(change) < 1e-12:
        method = "score"
        sums = float(change[change > 0].sum()), float(-change[change < 0].sum())
        interval = gain_interval(*sums, len(x))
    else:
        method, interval = "bootstrap", bootstrap([change], resamples=RESAMPLES)
    return {
        "tasks": len(x),
        "success": [round(float(x.mean()), 6), round(float(y.mean()), 6)],
        "gain": round(float(change.mean()), 6),
        "interval": [round(bound, 6) for bound in interval],
        "gained": gained,
        "lost": lost,
        "p_value": sign_test(gained, lost),
        "method": method,
    }


def sign_test(gained: int, lost: int) -> float:
    """Return the two-sided exact probability of a count as uneven as this, if both were as likely."""
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1))
    return min(1.0, float(2 * tail / 2**changed))


def find_evaluation(path: Path) -> Path:
    """Return the folder with the episodes of an evaluation.

    Raises:
      ConfigError: there is none.
    """
    for folder in (path, path / "eval"):
        if (folder / EPISODES).is_file():
            return folder
    partial = [file for each in (path, path / "eval") for file in each.glob("episodes-*.partial.jsonl")]
    told = " (one is not finished: call the same empg-jax eval again)" if partial else ""
    raise ConfigError(
        f"{path} holds no evaluation{told}: expected {EPISODES}, which empg-jax eval --out writes"
    )


def read_tasks(folder: Path) -> Tasks:
    """Read what the episodes of an evaluation say of every task.

    Raises:
      ConfigError: a line is no episode.
    """
    results, found = collections.defaultdict(list), Tasks({}, {}, {})
    with (folder / EPISODES).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                task = str(record["split"]), int(record["task"])
                if not isinstance(record["success"], bool):
                    raise TypeError
                results[task].append(record["success"])
                turns = record.get("turns") or [{}]
                found.begins[task] = turns[0].get("observation")
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ConfigError(f"{folder / EPISODES}, line {number}: no episode") from None
            found.groups[task] = str(record.get("group", ""))
    found.shares.update({task: sum(each) / len(each) for task, each in results.items()})
    return found


def render_comparison(found: Mapping[str, Any]) -> str:
    """Render a comparison as Markdown: a row for all tasks, and one per group; notes below."""
    lines = [
        f"# {found['second']} against {found['first']}",
        "",
        "| group | tasks | first | second | difference, 95 % interval | gained | lost | p |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in {"all tasks": found, **found["groups"]}.items():
        low, high = row["interval"]
        first, second = row["success"]
        difference = f"{row['gain'] * 100:+.1f} [{low * 100:+.1f}, {high * 100:+.1f}]"
        name = " ".join(name.split()).replace("|", "\\|")
        lines.append(
            f"| {name} | {row['tasks']} | {first:.1%} | {second:.1%} | {difference} | {row['gained']} | "
            f"{row['lost']} | {row['p_value']:.3g} |"
        )
    lines += [f"\nNote: {note}." for note in found["notes"]]
    return "\n".join(lines) + "\n"


def _check_same_tasks(folders: Sequence[Path], begins: Sequence[tuple[str | None, str | None]]) -> list[str]:
    """Refuse evaluations whose tasks only have equal numbers; return what speaks against equal tasks.

    Options may differ where all tasks begin with the same observation, as for another address of a server.
    ``begins``: the two first observations of every common task.
    """
    abouts = [_read_about(folder) for folder in folders]
    envs = [about.get("env") for about in abouts]
    options = [about["env_options"] for about in abouts if "env_options" in about]
    if None not in envs and envs[0] != envs[1]:
        raise ConfigError(f"{folders[0]} is of {envs[0]}, {folders[1]} of {envs[1]}: their tasks differ")
    known = [each for each in begins if None not in each]
    others = sum(x != y for x, y in known)
    unlike = _list_unlike(*options) if len(options) == 2 else ""
    if unlike and (others or not known):
        raise ConfigError(f"{folders[0]} and {folders[1]} are of different tasks: {unlike}")
    if unlike:
        return [f"{unlike}, though all tasks begin with the same observation"]
    if others:
        return [f"{others} of {len(known)} tasks begin with another observation"]
    if len(options) < 2 and not known:
        return ["whether both are of the same tasks could not be checked: eval.json has no env_options"]
    return []


def _list_unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    keys = sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
    return "; ".join(f"env.options.{key} is {first.get(key)} and {second.get(key)}" for key in keys)


def _read_about(folder: Path) -> dict[str, Any]:
    """Read what an evaluation says of itself; nothing where its file is not there or damaged."""
    try:
        about = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}
