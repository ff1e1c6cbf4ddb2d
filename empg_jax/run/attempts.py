"""The finished attempts of an evaluation on disk, so that one that was cut off goes on.

While an evaluation runs, each finished attempt is a line of ``episodes-ID.partial.jsonl``. ``ID`` stands for
everything that decides its result: the same command finds the same file. At the end it gives way to
``eval.json``, ``eval.md`` and ``episodes.jsonl``, which `empg_jax.report.pairing` compares.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_jax.errors import RunError, writing
from empg_jax.files import append
from empg_jax.report.evaluation import write_evaluation
from empg_jax.rollout.record import describe_episodes, make_trajectory
from empg_jax.run.lock import open_locked
from empg_jax.types import Trajectory

if TYPE_CHECKING:
    from empg_jax.config import Config

# Sections of the configuration that no result depends on.
IRRELEVANT = ("name", "run_dir", "compile_cache", "log", "workers", "checkpoint", "faults", "hosts", "serve")


def identify(config: Config, *parts: object) -> str:
    """Return the name of an evaluation: equal for the same policy, tasks, prompts and sampling.

    Args:
      config: the configuration.
      *parts: what else decides: the policy, the number of attempts.
    """
    settings = config.model_dump(mode="json", exclude=set(IRRELEVANT))
    text = json.dumps([settings, [str(part) for part in parts]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Attempts:
    """The file of an evaluation in progress.

    Args:
      folder: where it lies; it is made if need be. None keeps nothing.
      identity: of `identify`.

    Raises:
      RunError: the folder cannot be written, or the same evaluation is in progress there.

    Attributes:
      done: the episodes that an earlier call finished.
    """

    def __init__(self, folder: Path | None, identity: str) -> None:
        self._folder = folder
        self.done: list[Trajectory] = []
        if folder is None:
            return
        self._path = folder / f"episodes-{identity}.partial.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = _open_alone(self._path)
            text = self._path.read_text(encoding="utf-8", errors="replace")
            self.done = _read(text)
            if text and not text.endswith("\n"):  # a line that was cut off would spoil the next one
                append(self._file, b"\n")
        except OSError as error:
            raise RunError(f"the evaluation cannot be kept in {folder}: {error}") from None

    def __enter__(self) -> Attempts:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._folder is not None:
            self._file.close()

    def keep(self, episode: Trajectory) -> None:
        """Add a finished attempt.

        Raises:
          RunError: it cannot be written.
        """
        if self._folder is not None:
            with writing(self._path):
                append(self._file, _as_line(episode).encode())

    def finish(self, episodes: Sequence[Trajectory], result: Mapping[str, Any]) -> None:
        """Write the result and the episodes, in the order of the tasks, in the place of this file.

        Raises:
          RunError: they cannot be written; those of an older evaluation stay, and so does this file.
        """
        if self._folder is None:
            return
        write_evaluation(self._folder, result, "".join(map(_as_line, episodes)))
        self._path.unlink(missing_ok=True)
        self._file.close()  # and with it the lock


def _as_line(episode: Trajectory) -> str:
    (record,) = describe_episodes([episode], None, update=0)
    line = json.dumps(record, ensure_ascii=False, allow_nan=False)
    return line.encode("utf-8", "replace").decode() + "\n"  # halves of characters have no place in a file


def _open_alone(path: Path) -> FileIO:
    """Open the file for lines at its end, and lock it: two processes would both play what is left."""
    try:
        descriptor = open_locked(path, os.O_WRONLY | os.O_APPEND)
    except BlockingIOError:
        raise RunError(
            f"the same evaluation is in progress in {path.parent}: wait for its end, or give another "
            "folder with --out"
        ) from None
    return open(path, "ab", buffering=0, opener=lambda *_: descriptor)


def _read(text: str) -> list[Trajectory]:
    """Read the episodes, but for damaged lines, as the last one is after a kill: they are run again."""
    found: dict[tuple[int, int], Trajectory] = {}
    # Not `splitlines`, which also splits at characters that texts may hold.
    for line in text.split("\n"):
        try:
            episode = make_trajectory(_with_nan(json.loads(line)), is_transcript=False)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        found[episode.group_id, episode.member] = episode
    return list(found.values())


def _with_nan(record: dict[str, Any]) -> dict[str, Any]:
    """Put NaN where a number is not known: JSON has no such number."""
    unknown = {"entropy": math.nan, "logprob": math.nan}
    turns = [
        {**turn, **{name: nan for name, nan in unknown.items() if turn.get(name) is None}}
        for turn in record["turns"]
    ]
    return {**record, "turns": turns}
