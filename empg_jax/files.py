"""File writes that leave no part behind: a file is replaced whole, and a line is appended whole."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``; it replaces ``path`` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            # The content must reach the disk before the rename, or a crash could leave an empty file.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def try_folder(folder: Path) -> None:
    """Make a temporary file in a folder, or in the nearest one above it that exists, and remove it.

    Raises:
      OSError: nothing can be written there.
    """
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    with tempfile.TemporaryFile(dir=there):
        pass


def append(file: FileIO, content: bytes) -> None:
    """Append to an unbuffered file: all of the content, or nothing.

    On a disk that is nearly full, the system writes a part and says so by its length alone. What comes next
    would be glued to that part, so it is removed.

    Raises:
      OSError: the content could not be written.
    """
    done = 0
    try:
        while done < len(content):
            written = file.write(content[done:])
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file.name))
            done += written
    except OSError:
        if done:
            file.truncate(file.tell() - done)
        raise


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_json_atomic(path: Path, value: Mapping[str, Any]) -> None:
    """Write indented JSON atomically; NaN and infinity become null."""
    write_text_atomic(path, format_json(value))


def format_json(value: Mapping[str, Any]) -> str:
    """Format indented JSON; NaN and infinity become null."""
    return json.dumps(as_json(value), indent=2, allow_nan=False) + "\n"


def write_together(texts: Mapping[Path, str]) -> None:
    """Write several text files, in UTF-8; where there is no room for all, none is replaced.

    Raises:
      OSError: one cannot be written.
    """
    with contextlib.ExitStack() as stack:
        for path, text in texts.items():
            file = stack.enter_context(replacing(path))
            file.write(text.encode("utf-8"))
            file.flush()


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      ValueError: the file holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a value of type {type(value).__name__}")
    return value


def as_json(value: Any) -> Any:
    """Replace NaN and infinity by None wherever they are: JSON has neither."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {name: as_json(each) for name, each in value.items()}
        case list() | tuple():
            return [as_json(each) for each in value]
    return value
