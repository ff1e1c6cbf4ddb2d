"""The results of a study on disk, shared by any number of processes.

``runs.jsonl`` holds one line per finished or failed run and only grows. A run that is being made is claimed
by a lock on a file of its own: the kernel gives it back when the last process that holds it is gone.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from typing import Any

from study_plan import Study, Triple

from empg_jax.errors import ConfigError
from empg_jax.files import as_json

FILENAME, CLAIMS = "runs.jsonl", ".claims"

Line = dict[str, Any]


class Ledger:
    """The lines of a study, and the claims on its runs.

    Args:
      study: the study; its folder must be writable to append and to claim.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self.path = study.folder / FILENAME

    def read(self) -> list[Line]:
        """Read all lines, oldest first; one that a crash cut short is left out, and its run is still to do.

        Raises:
          ConfigError: a line was made with other settings than the study's file has now.
        """
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            content = file.read()
        lines = []
        for text in content.splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
        for line in lines:
            self._check(line)
        return lines

    def count(self) -> collections.Counter[Triple]:
        """Count the lines of each run: failed attempts have one, too."""
        return collections.Counter(map(triple_of, self.read()))

    def append(self, line: Line) -> None:
        """Append a line, whole or not at all as far as readers can see."""
        content = json.dumps(as_json(line), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        with self.path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    content = b"\n" + content  # the rest of a process that was killed while it wrote
            file.write(content)
            os.fsync(file.fileno())

    def claim(self, triple: Triple) -> int | None:
        """Claim a run for this process and those that inherit the descriptor; None if another has it.

        Closing the descriptor gives the claim back.
        """
        folder = self._study.folder / CLAIMS
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder / triple.name, os.O_RDWR | os.O_CREAT, 0o644)
        for _ in range(4):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)  # `claimed` holds a lock for a moment
            else:
                return descriptor
        os.close(descriptor)
        return None

    def claimed(self) -> Iterator[Triple]:
        """The runs that some process is making now."""
        for triple in self._study.triples():
            if (self._study.folder / CLAIMS / triple.name).exists():
                descriptor = self.claim(triple)
                if descriptor is None:
                    yield triple
                else:
                    os.close(descriptor)

    def _check(self, line: Line) -> None:
        triple = triple_of(line)
        is_known = triple.task in self._study.tasks and triple.arm in self._study.arms
        if is_known and line["settings"] != self._study.settings(triple):
            raise ConfigError(
                f"{self.path}: {triple.name} was run with {line['settings']}, but the study says "
                f"{self._study.settings(triple)}: give changed arms and tasks a new name"
            )


def triple_of(line: Line) -> Triple:
    """The run that a line tells of."""
    return Triple(line["task"], line["arm"], line["seed"])


def newest(lines: list[Line]) -> dict[Triple, Line]:
    """The last line of each run."""
    return {triple_of(line): line for line in lines}
