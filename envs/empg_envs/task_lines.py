"""Tasks as JSON lines, or as numbers, in panels by split."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

HOLD_OUT = 5  # every so-many-th task is a test task where no task says its split

_log = logging.getLogger(__name__)

Panels = dict[str, list[dict[str, Any]]]


def number_tasks(count: int) -> Panels:
    """Make ``count`` tasks of each split that are numbers."""
    return {
        "train": [{"number": i} for i in range(count)],
        "test": [{"number": count + i} for i in range(count)],
    }


def read_tasks(path: str) -> Panels:
    """Read tasks from a file; ``"split"`` in a task says ``train`` or ``test``.

    Raises:
      ValueError: the file cannot be read, or a line is no task.
    """
    tasks: list[dict[str, Any]] = []
    try:
        lines = Path(os.path.expanduser(path)).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"tasks={path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            task = json.loads(line)
        except ValueError as error:
            raise ValueError(f"tasks={path}, line {number}: not JSON ({error})") from None
        if not isinstance(task, dict) or task.get("split", "train") not in ("train", "test"):
            raise ValueError(f'tasks={path}, line {number}: expected an object, its "split" train or test')
        tasks.append(task)
    has_splits = any("split" in task for task in tasks)
    panels: Panels = {"train": [], "test": []}
    for number, task in enumerate(tasks, start=1):
        held_out = "train" if number % HOLD_OUT else "test"
        panels[task.get("split", "train") if has_splits else held_out].append(task)
    if not has_splits:
        held_out_hashes = {hash_of(task) for task in panels["test"]}
        kept = [task for task in panels["train"] if hash_of(task) not in held_out_hashes]
        if dropped := len(panels["train"]) - len(kept):
            _log.warning("tasks=%s: %d training tasks are left out: they are test tasks, too", path, dropped)
        panels["train"] = kept
    if not panels["train"]:
        raise ValueError(f"tasks={path}: no task to train on")
    return {split: panel for split, panel in panels.items() if panel}


def hash_of(task: dict[str, Any]) -> str:
    """Return the hash of a task's content, without its split."""
    content = {key: value for key, value in task.items() if key != "split"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe_task(task: dict[str, Any], split: str, index: int) -> dict[str, Any]:
    """Return a task with its place, and its hash, which does not depend on the place."""
    return {**task, "split": split, "index": index, "content_hash": hash_of(task)}
