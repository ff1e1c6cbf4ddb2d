"""Failures that are told in one line: one family, so that the command line needs no list of them.

An error of this family names what is wrong and what to do; the command line prints it without a traceback and
ends with the class's exit code. Everything else keeps its traceback: it is a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """Bad input, refused before anything is written.

    Attributes:
      exit_code: what the command line ends with.
    """

    exit_code = 2


class ConfigError(UserError, ValueError):
    """What is wrong with a configuration, for the person who wrote it."""


class RunError(UserError, RuntimeError):
    """Something failed after it had begun."""

    exit_code = 1


class Stopped(UserError):
    """The run was asked to stop and has written its checkpoint.

    Attributes:
      signum: the signal that asked.
      run_dir: the run to resume.
    """

    def __init__(self, signum: int, run_dir: Path) -> None:
        super().__init__(f"stopped by signal {signum}; go on with: empg-jax train --resume {run_dir}")
        self.signum, self.run_dir = signum, run_dir
        self.exit_code = 128 + signum


def closest(wrong: str, choices: Iterable[str]) -> str | None:
    """The choice spelled most alike, or None when none is close."""
    found = difflib.get_close_matches(wrong, list(choices), n=1, cutoff=0.6)
    return found[0] if found else None


def nearest(wrong: str, choices: Iterable[str]) -> str:
    """`closest` as a hint to append to a message; empty when none is close."""
    found = closest(wrong, choices)
    return f" (did you mean {found}?)" if found else ""
