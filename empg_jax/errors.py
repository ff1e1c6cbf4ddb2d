"""The family of errors that are reported in one line.

The message of such an error names the problem and the remedy. The command line prints it without a traceback
and ends with the class's exit code. Every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path

LONGEST_LINE = 300  # characters of a foreign message: some hold the shapes of a whole model


class UserError(Exception):
    """Bad input, refused before anything is written.

    Attributes:
      exit_code: exit code of the command line.
    """

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A mistake in a configuration, described for its author."""


class RunError(UserError, RuntimeError):
    """A failure after work had started."""

    exit_code = 1


class CheckpointError(RunError):
    """A checkpoint could not be written or read."""


class RefusedCheckpoint(CheckpointError):
    """There is no such run, or its checkpoint does not fit the request; nothing was started."""

    exit_code = 2


class Interrupted(Exception):
    """A request to stop that arrived in the middle of work."""


class Stopped(UserError):
    """The run was asked to stop and has written its checkpoint, or was not begun.

    Attributes:
      signum: the signal that requested the stop.
      run_dir: the run to resume; None before there is one.
    """

    def __init__(self, signum: int, run_dir: Path | None) -> None:
        way_on = (
            "nothing was written" if run_dir is None else f"go on with: empg-jax train --resume {run_dir}"
        )
        super().__init__(f"stopped by signal {signum}; {way_on}")
        self.signum, self.run_dir = signum, run_dir
        self.exit_code = 128 + signum


@contextlib.contextmanager
def writing(what: object, kind: type[UserError] = RunError) -> Iterator[None]:
    """Tell in one line what cannot be written, as an error of that kind, and why."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what} cannot be written: {error.strerror or error}") from error


def first_line(error: Exception) -> str:
    """Return an error's class and the first line of its message, cut short where it is very long."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else "no message"
    line = line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..."
    return f"{type(error).__name__}: {line}"


def closest(wrong: str, choices: Iterable[str]) -> str | None:
    """Return the choice with the most similar spelling, or None when none is similar.

    Of all that are similar, one of the same letters in another order goes first.
    """
    names = list(choices)
    found = difflib.get_close_matches(wrong, names, n=max(1, len(names)), cutoff=0.6)
    return min(found, key=lambda choice: sorted(choice) != sorted(wrong), default=None)


def nearest(wrong: str, choices: Iterable[str]) -> str:
    """Format `closest` as a hint to append to a message; empty when no choice is similar."""
    found = closest(wrong, choices)
    return f" (did you mean {found}?)" if found else ""
