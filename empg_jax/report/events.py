"""The diary of a run: ``events.jsonl``, one line per happening outside the normal course.

A line is ``{"time": seconds since 1970, "update": the update that was being made, "event": name, ...}``.
Lines are only ever added. A resumed run repeats updates, and what happened the first time still happened.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

FILENAME = "events.jsonl"


class EventLog:
    """Writes the events of a run; usable as a context manager.

    Args:
      run_dir: the run's folder; must exist.

    Attributes:
      update: the update that is being made; written on every line.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path, self.update = Path(run_dir) / FILENAME, 0
        _cut_last_line(self.path)
        # Unbuffered and in append mode: a line is one write, complete or absent.
        self._file = self.path.open("ab", buffering=0)

    def tell(self, event: str, /, **fields: Any) -> None:
        """Append one event. Values are strings, integers, finite numbers, booleans or lists of these.

        Args:
          event: its name, for example ``worker_restarted``.
          **fields: what else there is to say of it.
        """
        record = {"time": round(time.time(), 3), "update": self.update, "event": event, **fields}
        numbers = {name: value for name, value in record.items() if isinstance(value, float)}
        record |= {name: None for name, value in numbers.items() if not math.isfinite(value)}
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._file.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cut_last_line(path: Path) -> None:
    """Remove a line that a crash cut off, so that the next one begins at its own start."""
    if not path.exists():
        return
    content = path.read_bytes()
    kept = content.rfind(b"\n") + 1
    if kept < len(content):
        os.truncate(path, kept)
