"""Prediction files in SWE-bench's format: one JSON object per line with an agent's patch for a task."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from empg_envs.rows import DataError, read_rows

FIELDS = ("instance_id", "model_name_or_path", "model_patch")


def prediction(instance_id: str, model: str, patch: str) -> dict[str, str]:
    """Return one row of a prediction file."""
    return dict(zip(FIELDS, (instance_id, model, patch), strict=True))


def append_prediction(path: str | Path, row: Mapping[str, str]) -> None:
    """Append a row; several processes may append to the same file."""
    line = json.dumps({field: row[field] for field in FIELDS}).encode() + b"\n"
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(number, line)  # a single write in append mode is atomic
    finally:
        os.close(number)


def write_predictions(path: str | Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write the file atomically."""
    target = Path(path)
    fresh = target.with_name(target.name + ".new")
    text = "".join(json.dumps({field: row[field] for field in FIELDS}) + "\n" for row in rows)
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(target)


def read_predictions(path: str | Path) -> dict[str, str]:
    """Read the patches by task from JSON lines, a JSON list, or a JSON mapping.

    Of several rows for one task the last one counts.

    Raises:
      DataError: a row is none, or lacks a field; the message names the row.
    """
    patches: dict[str, str] = {}
    for number, row in enumerate(_rows(path), start=1):
        missing = [field for field in ("instance_id", "model_patch") if field not in row]
        if missing:
            raise DataError(f"{path}: prediction {number} has no field {missing[0]!r}")
        patches[str(row["instance_id"])] = str(row["model_patch"] or "")
    return patches


def _rows(path: str | Path) -> Iterable[dict[str, Any]]:
    text = Path(path).read_bytes()
    if text.lstrip().startswith(b"{"):
        try:
            whole = json.loads(text)
        except ValueError:
            whole = None  # several lines
        if isinstance(whole, dict) and "instance_id" not in whole:
            for name, row in whole.items():
                if not isinstance(row, dict):
                    raise DataError(f"{path}: {name!r} is {row!r:.40}; expected an object with 'model_patch'")
            return [{"instance_id": name, **row} for name, row in whole.items()]
    return (row for _, row in read_rows(path))
