"""The event log of a run: ``events.jsonl``, one line per unusual event such as a fault.

A line is ``{"time": seconds since 1970, "update": number of the current update, "event": name, ...}``. Lines
are only appended. A resumed run repeats updates, but the events of the first attempt stay in the log.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from empg_jax.errors import writing
from empg_jax.files import append

FILENAME = "events.jsonl"


class EventLog:
    """The writer of a run's events; usable as a context manager.

    Args:
      run_dir: the run's folder; must exist.
      host: number of this host; host 0 writes ``events.jsonl``, host 1 ``events.1.jsonl``, and so on.

    Attributes:
      update: number of the current update; written on every line.
    """

    def __init__(self, run_dir: Path, host: int = 0) -> None:
        name = FILENAME if host == 0 else FILENAME.replace(".", f".{host}.")
        self.path, self.update = Path(run_dir) / name, 0
        _cut_last_line(self.path)
        # Unbuffered and in append mode: a line is one write, complete or absent.
        self._file = self.path.open("ab", buffering=0)

    def tell(self, event: str, /, **fields: Any) -> None:
        """Append one event. Values are strings, integers, finite numbers, booleans or lists of these.

        Args:
          event: name of the event, for example ``worker_restarted``.
          **fields: further values of the event.

        Raises:
          RunError: the file cannot be written.
        """
        record = {"time": round(time.time(), 3), "update": self.update, "event": event, **fields}
        # JSON has no NaN or infinity; such values become null.
        numbers = {name: value for name, value in record.items() if isinstance(value, float)}
        record |= {name: None for name, value in numbers.items() if not math.isfinite(value)}
        # What UTF-8 cannot encode, half of a character, is written as JSON escapes it.
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        with writing(self.path):
            append(self._file, line.encode("utf-8", "backslashreplace") + b"\n")

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._file.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cut_last_line(path: Path) -> None:
    """Remove an incomplete last line, left by a crash, so that the next event gets a line of its own."""
    if not path.exists():
        return
    content = path.read_bytes()
    kept = content.rfind(b"\n") + 1
    if kept < len(content):
        os.truncate(path, kept)
