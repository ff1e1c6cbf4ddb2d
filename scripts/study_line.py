"""The line of a finished run: everything that the report needs, read from the run's folder."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import math
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import empg_jax
from empg_jax.metrics import read_metrics
from empg_jax.report.curves import held_out_points
from empg_jax.report.statistics import area, updates_to

ROOT = Path(empg_jax.__file__).parents[1]
LEVEL = 0.6  # of updates_to_60
# What the pictures and the claims need of every update.
SERIES = (
    "success_rate",
    "entropy",
    "turn_entropy_mean",
    "advantage_positive",
    "advantage_negative",
    "grad_norm",
    "entropy_drift_predicted",
    "entropy_drift_measured",
    "mixed_groups",
    "modulation_std",
)


SPENT = ("environment_steps", "cpu_seconds")  # what curves are compared at equal amounts of


class Incomplete(ValueError):
    """A run that ended without an error and yet lacks what a line needs."""


def read_run(folder: Path) -> dict[str, Any]:
    """Read what a finished run says of itself.

    Returns:
      The entries of a line that come from the run's folder; values are rounded to 5 digits.

    Raises:
      Incomplete: the summary, the weights' checksum or a point of the curve is missing.
    """
    path = folder / "summary.json"
    if not path.exists():
        raise Incomplete(f"{path} is missing")
    summary = json.loads(path.read_text(encoding="utf-8"))
    records = read_metrics(folder / "metrics.jsonl")
    curve = [(update, value) for update, value in held_out_points(folder, records).items()]
    known = {update for update, value in curve if math.isfinite(value)}
    missing = sorted({0, summary["updates"], *dict(curve)} - known)
    if missing or "weights_before" not in summary:
        what = f"held-out success after updates {missing}" if missing else "weights_before"
        raise Incomplete(f"{folder} lacks {what}")
    return {
        **_environment(folder),
        "updates": summary["updates"],
        "wall_seconds": summary["wall_seconds"]["total"],
        "weights_before": summary["weights_before"],
        "eval_tasks": summary["eval_tasks"],
        "curve": [[update, _short(value)] for update, value in curve],
        "spent": spent_at([update for update, _ in curve], records),
        "area": area(curve),
        "updates_to_60": updates_to(curve, LEVEL),
        "end_success": curve[-1][1],
        "end_tasks": summary["eval_tasks"],
        "series": {
            "update": [record["update"] for record in records],
            **{name: [_short(record.get(name)) for record in records] for name in SERIES},
        },
    }


def spent_at(updates: Sequence[int], records: Sequence[dict[str, Any]]) -> dict[str, list[float]] | None:
    """Sum what training had spent at each point of the curve; evaluations and warm start are not in it.

    Args:
      updates: the updates of the points, ascending.
      records: the lines of the run's metrics.

    Returns:
      Sums by metric, one for each point; None where an update is not in the record, or none was made.
    """
    if updates[-1] == 0 or [record["update"] for record in records] != list(range(1, updates[-1] + 1)):
        return None
    if any(record.get(name) is None for record in records for name in SPENT):
        return None
    sums = {name: list(itertools.accumulate((r[name] for r in records), initial=0.0)) for name in SPENT}
    return {name: [float(f"{totals[update]:.6g}") for update in updates] for name, totals in sums.items()}


def describe_failure(code: int, log: Path) -> str:
    """Describe a failure in a line: the exit code and the last lines of the log."""
    ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    last = [line.strip() for line in text.splitlines() if line.strip()][-3:]
    return ": ".join([ended, " / ".join(last)[-600:]]) if last else ended


def find_changes() -> str | None:
    """A checksum of what the checkout has beside its commit, results of studies aside; None: nothing."""
    where = ["--", ".", ":(exclude)scripts/studies"]
    parts = [_git("diff", "HEAD", "--binary", *where)]
    for name in _git("ls-files", "-z", "--others", "--exclude-standard", *where).split(b"\0")[:-1]:
        path = ROOT / os.fsdecode(name)
        parts += [name, path.read_bytes() if path.is_file() else b""]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16] if any(parts) else None


def _git(*arguments: str) -> bytes:
    """What git prints; nothing outside of a checkout."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False).stdout


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def _environment(folder: Path) -> dict[str, Any]:
    """Versions and hardware of the run's attempts: of the newest, and every commit that took part."""
    paths = sorted(folder.glob("environment*.json"), key=lambda path: (len(path.name), path.name))
    found: Sequence[dict[str, Any]] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if not found:
        raise Incomplete(f"{folder} has no environment.json")
    last = found[-1]
    git = [each["git"] or {} for each in found]
    return {
        "commit": git[-1].get("commit"),
        "commits": list(dict.fromkeys(each.get("commit") for each in git)),
        "versions": {"python": last["python"], **last["packages"]},
        "hardware": {
            "processor": processor(),
            "cpus": last["cpus"],
            "devices": last["devices"],
            "platform": last["platform"],
        },
    }


def processor() -> str | None:
    """Return the name of this machine's processor; None where nothing tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
