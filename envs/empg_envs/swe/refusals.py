"""How the commands of this folder end when they cannot do what they were asked: one line, no traceback."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from empg_envs.swe.fetch import FetchError
from empg_envs.swe.sandbox import SandboxError

REFUSED, FAILED = 2, 1  # bad input and nothing written; failed after it had begun


@contextlib.contextmanager
def one_line(code: int = REFUSED) -> Iterator[None]:
    """Turns what can be expected to go wrong into one line on stderr and an exit code."""
    try:
        yield
    except (OSError, ValueError, FetchError, SandboxError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(code) from None


def check_out(path: Path | None) -> None:
    """Looks at the file that is to be written before hours of work.

    Raises:
      FileNotFoundError: its folder does not exist.
      IsADirectoryError: it is a folder.
    """
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"--out {path} is a folder; name a file")
