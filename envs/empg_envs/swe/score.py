"""Grade a predictions file in SWE-bench's format.

    python -m empg_envs.swe.score tasks.jsonl predictions.jsonl --out report.json
    python -m empg_envs.swe.score verified.parquet predictions.jsonl --backend docker --jobs 8

``gold`` instead of a predictions file grades the tasks' own patches. The exit code is 1 if a task cannot be
graded; the report has the others.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from empg_envs.rows import FORM
from empg_envs.swe.backends import NAMES, Backend, check_has_files, make_backend
from empg_envs.swe.grading import Grade
from empg_envs.swe.predictions import read_predictions
from empg_envs.swe.refusals import FAILED, check_out, one_line
from empg_envs.swe.sandbox import SandboxError
from empg_envs.swe.tasks import Task, load_panels


def score(
    backend: Backend,
    tasks: Sequence[Task],
    predictions: Mapping[str, str],
    *,
    timeout: float,
    jobs: int = 1,
    on_grade: Callable[[Task, Grade], None] = lambda task, grade: None,
) -> dict[str, Any]:
    """Grade every task; a task without a prediction, or that cannot be graded, does not count as resolved.

    Args:
      backend: the backend that runs the tests.
      tasks: the tasks.
      predictions: patches by instance id.
      timeout: time limit of one task's tests in seconds.
      jobs: number of tasks graded at the same time.
      on_grade: called with each grade, in the order of the tasks.

    Returns:
      Counts and the ids behind them: ``total``, ``resolved``, ``resolved_ids``, ``unresolved_ids``,
      ``missing_ids`` (no prediction), ``unknown_ids`` (predictions for no task), ``reasons`` by id,
      ``doubts`` by id of the suspect ones, and ``errors`` by id of those that cannot be graded.
    """
    given = [task for task in tasks if task.instance_id in predictions]
    reasons: dict[str, str] = {}
    doubts: dict[str, list[str]] = {}
    errors: dict[str, str] = {}
    resolved: list[str] = []
    with concurrent.futures.ThreadPoolExecutor(max(1, jobs)) as pool:
        work = [pool.submit(backend.grade, task, predictions[task.instance_id], timeout) for task in given]
        for task, job in zip(given, work, strict=True):
            try:
                grade = job.result()
            except (ValueError, SandboxError) as error:
                errors[task.instance_id] = " ".join(str(error).split())
                continue
            reasons[task.instance_id] = grade.reason
            if grade.doubts:
                doubts[task.instance_id] = list(grade.doubts)
            if grade.resolved:
                resolved.append(task.instance_id)
            on_grade(task, grade)
    names = {task.instance_id for task in tasks}
    return {
        "total": len(tasks),
        "resolved": len(resolved),
        "resolved_ids": sorted(resolved),
        "unresolved_ids": sorted(set(reasons) - set(resolved)),
        "missing_ids": sorted(names - set(predictions)),
        "unknown_ids": sorted(set(predictions) - names),
        "reasons": reasons,
        "doubts": doubts,
        "errors": errors,
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tasks", help=f"tiny, a file of task rows, or {FORM}")
    parser.add_argument("predictions", help="file of predictions, or gold")
    parser.add_argument("--split", default=None, help="judge one split only")
    parser.add_argument("--backend", choices=NAMES[:3], default="bubblewrap")
    parser.add_argument("--python", default=None, help="interpreter of the tasks (bubblewrap)")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: the backend's env.options")
    parser.add_argument("--sources", default=None, help="folder of source archives (bubblewrap)")
    parser.add_argument("--timeout", type=float, default=300.0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="write the report as JSON")
    return parser.parse_args(argv)


def _read(options: argparse.Namespace) -> tuple[list[Task], dict[str, str], Backend]:
    """Tasks, predictions and the backend that the command line names."""
    check_out(options.out)
    panels = load_panels(options.tasks, has_commit=options.predictions == "gold")
    if options.split is not None and options.split not in panels:
        raise ValueError(f"unknown split {options.split!r}; the splits are {', '.join(panels)}")
    chosen = panels.values() if options.split is None else [panels[options.split]]
    tasks = [task for panel in chosen for task in panel]
    check_has_files(tasks, options.backend)
    if options.predictions == "gold":
        predictions = {task.instance_id: task.patch for task in tasks}
    else:
        predictions = read_predictions(options.predictions)
    given = {"python": options.python, "sources": options.sources, **options.options}
    return tasks, predictions, make_backend(options.backend, **given)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module's text."""
    options = _parse(argv)
    with one_line():
        tasks, predictions, backend = _read(options)
    with one_line(FAILED):
        report = score(
            backend,
            tasks,
            predictions,
            timeout=options.timeout,
            jobs=options.jobs,
            on_grade=lambda task, grade: print(f"{task.instance_id}: {grade.reason}", flush=True),
        )
        if options.out is not None:
            fresh = options.out.with_name(options.out.name + ".new")
            fresh.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            fresh.replace(options.out)
    print(f"resolved {report['resolved']} of {report['total']}")
    for name, why in report["errors"].items():
        print(f"error: {name} cannot be graded: {why}", file=sys.stderr)
    if report["errors"]:
        raise SystemExit(FAILED)


if __name__ == "__main__":
    main()
