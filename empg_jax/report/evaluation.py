"""The report of an evaluation: estimates over all tasks and each group of tasks, as JSON and as Markdown."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_jax.errors import ConfigError, RunError
from empg_jax.files import format_json, try_folder, write_together
from empg_jax.metrics import label_groups
from empg_jax.report.intervals import estimate, pass_at_k, sizes_up_to
from empg_jax.report.pairing import EPISODES

if TYPE_CHECKING:
    from empg_jax.types import Trajectory

# Numbers of the result that a line below the table tells: key -> label.
TOLD = {
    "eval_return": "mean return",
    "eval_turns": "turns per episode",
    "eval_entropy": "token entropy (nats)",
    "eval_invalid_actions": "share of invalid actions",
    "eval_missing": "attempts without a result",
    "eval_resumed": "attempts that an earlier call finished",
}


def estimate_success(episodes: Iterable[Trajectory], attempts: int) -> dict[str, Any]:
    """Estimate success over all tasks, and over every group of `empg_jax.metrics.label_groups`.

    Args:
      episodes: the attempts that have a result.
      attempts: attempts that were made at each task. A task with fewer results, because its environment
        failed, has no part in pass@k for a larger k.

    Returns:
      ``attempts``; ``mean@k`` and ``pass@k``, by k, each an `estimate`; ``groups``: the same two by group.
    """
    episodes = list(episodes)
    return {
        "attempts": attempts,
        **_estimates(episodes, attempts),
        "groups": {name: _estimates(each, attempts) for name, each in label_groups(episodes).items()},
    }


def _estimates(episodes: Iterable[Trajectory], attempts: int) -> dict[str, Any]:
    by_task: dict[tuple[str, int], list[bool]] = collections.defaultdict(list)
    for episode in episodes:
        by_task[episode.split, episode.task].append(episode.is_success)
    results = list(by_task.values())
    passes = {}
    for k in sizes_up_to(attempts):
        values = [pass_at_k(len(task), sum(task), k) for task in results if len(task) >= k]
        if values:
            passes[str(k)] = estimate(values)
    return {
        "mean@k": {str(attempts): estimate([sum(task) / len(task) for task in results])},
        "pass@k": passes,
    }


def check_out(out: Path, *, is_chosen: bool) -> None:
    """Refuse a folder for the report that cannot be made or written, before the evaluation begins.

    Args:
      out: the folder.
      is_chosen: whether ``--out`` names it; else it is made with the folders above it.

    Raises:
      ConfigError: it is a file, nothing can be written there, or the folder above a chosen one is missing.
    """
    if is_chosen and ((out.exists() and not out.is_dir()) or not out.absolute().parent.is_dir()):
        raise ConfigError(f"--out {out}: expected a folder, or a new one in a folder that exists")
    try:
        try_folder(out)
    except OSError as error:
        what, way = (f"--out {out}", "") if is_chosen else (out, "; --out FOLDER names another")
        raise ConfigError(f"{what} cannot be written: {error.strerror or error}{way}") from None


def write_evaluation(folder: Path, result: Mapping[str, Any], episodes: str) -> None:
    """Write ``eval.json``, ``eval.md`` and ``episodes.jsonl`` in a folder; older ones are replaced together.

    Args:
      folder: an existing folder.
      result: what ``eval.json`` says.
      episodes: the lines of ``episodes.jsonl``.

    Raises:
      RunError: one cannot be written; the older ones stay.
    """
    texts = {"eval.json": format_json(result), "eval.md": render_evaluation(result), EPISODES: episodes}
    try:
        write_together({folder / name: text for name, text in texts.items()})
    except OSError as error:
        raise RunError(
            f"the evaluation is made, but {folder} cannot take its files: {error.strerror or error}; its "
            "attempts are kept: the same command writes them once there is room"
        ) from None


def render_evaluation(result: Mapping[str, Any]) -> str:
    """Render the result as Markdown: a table with a row for all tasks, and one per panel and group."""
    about = [f"{name} {result[key]}" for key, name in _HEAD.items() if key in result]
    rows = {"all tasks": result, **result.get("groups", {})}
    columns = [(kind, k) for kind in ("mean@k", "pass@k") for k in result.get(kind, {})]
    # With one attempt at each task, pass@1 says the same as mean@1.
    columns = columns[:1] if result.get("attempts") == 1 else columns
    heads = ["group", "tasks", *(f"{kind[:-1]}{k}, 95 % interval" for kind, k in columns)]
    lines = ["# Evaluation", "", ", ".join(about), "", _row(heads), _row(["---"] * len(heads))]
    lines += [_row([_plain(name), *_cells(found, columns)]) for name, found in rows.items()]
    told = [f"- {label}: {result[key]:.4g}" for key, label in TOLD.items() if key in result]
    return "\n".join([*lines, "", *told]) + "\n"


_HEAD = {
    "source": "policy",
    "step": "update",
    "env": "environment",
    "split": "panel",
    "eval_tasks": "tasks",
    "attempts": "attempts at each",
}


def _cells(found: Mapping[str, Any], columns: Sequence[tuple[str, str]]) -> list[str]:
    tasks = max((each["tasks"] for each in found.get("mean@k", {}).values()), default="-")
    cells = [found[kind].get(k) for kind, k in columns]
    return [str(tasks), *("-" if cell is None else _percent(cell) for cell in cells)]


def _percent(found: Mapping[str, Any]) -> str:
    low, high = (bound * 100 for bound in found["interval"])
    return f"{found['value']:.1%} [{low:.1f}, {high:.1f}]"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(name: str) -> str:
    """Keep a name of the environment's from breaking the table."""
    return " ".join(name.split()).replace("|", "\\|")
