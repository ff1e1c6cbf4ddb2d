"""The schedule of a rollout thread: what depended on the clock, so that a run with a lag can be repeated.

``schedule.jsonl`` has one line per round that did something: the version of the weights taken, the update
whose groups were reserved, the slots whose environments had answered, and the collector's clocks after it.
Everything else follows from these, the seed and the configuration. A resumed run cannot be repeated: its file
gets a line with the update that it goes on from, and no further rounds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from empg_jax.errors import ConfigError, RunError, writing
from empg_jax.files import append

FILENAME = "schedule.jsonl"


class ScheduleError(RunError):
    """A run differs from the schedule that it repeats."""


@dataclasses.dataclass
class Round:
    """One round of the rollout thread.

    Attributes:
      weights: version of the weights taken at its start; None: none.
      batch: update whose groups were reserved; None: none.
      answers: slots whose environments had answered, ascending; None: no episode was played.
      served: the collector's clock after the round, in seconds.
      aged: the clock of its episodes.
    """

    weights: int | None = None
    batch: int | None = None
    answers: list[int] | None = None
    served: float = 0.0
    aged: float = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return self.weights is None and self.batch is None and self.answers is None


class Recorder:
    """The writer of a run's schedule.

    Args:
      path: the file; lines are added to it.
      start: updates made so far; the first line says so.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._path, self._lines = path, [json.dumps({"start": start})]

    def add(self, done: Round) -> None:
        """Add a round; written with the next batch, so that a round costs no access to the disk."""
        self._lines.append(json.dumps({k: v for k, v in vars(done).items() if v is not None}))
        if done.batch is not None:
            self.flush()

    def flush(self) -> None:
        """Write the rounds added so far.

        Raises:
          RunError: they cannot be written.
        """
        text, self._lines = "".join(line + "\n" for line in self._lines), []
        with writing(self._path), self._path.open("ab", buffering=0) as file:
            append(file, text.encode())


def open_recorder(run_dir: Path, start: int, *, is_resumed: bool) -> Recorder | None:
    """Open a run's schedule; for a resumed run only say where it goes on, and return None."""
    recorder = Recorder(run_dir / FILENAME, start)
    if not is_resumed:
        return recorder
    recorder.flush()
    return None


def read_schedule(path: Path) -> Iterator[Round]:
    """Yield the rounds of a schedule.

    Raises:
      ConfigError: the file is missing or damaged, or belongs to a run that was resumed.
    """
    try:
        lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        starts = [line["start"] for line in lines if "start" in line]
        # Older versions had one clock for both.
        rounds = [Round(**{"aged": line.get("served", 0.0)} | line) for line in lines if "start" not in line]
    except OSError as error:
        raise ConfigError(f"rollout.schedule={path} cannot be read: {error}") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"rollout.schedule={path} is not a schedule: {error}") from None
    if starts != [0]:
        raise ConfigError(
            f"rollout.schedule={path}: only a run that was never resumed can be repeated; this one started "
            f"at updates {starts}"
        )
    return iter(rounds)
