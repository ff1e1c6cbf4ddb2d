"""A reader of JSON-lines files, plain or gzipped, on disk or in a data set of the Hugging Face hub."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HUB = "hub:"


class DataError(ValueError):
    """An unusable file of questions or passages. The message gives file, line and cause."""


def find_file(path: str) -> Path:
    """Return a local file; ``hub:owner/name/path/in/data/set`` is downloaded to the hub's cache.

    Raises:
      DataError: there is no such file.
    """
    if not path.startswith(HUB):
        local = Path(path).expanduser()
        if not local.is_file():
            raise DataError(f"no file {path} (a file of a data set on the hub is hub:owner/name/path)")
        return local
    owner, _, rest = path.removeprefix(HUB).partition("/")
    name, _, inside = rest.partition("/")
    if not (owner and name and inside):
        raise DataError(f"{path} names no file on the hub; expected hub:owner/name/path")
    import huggingface_hub  # only when something is to be downloaded
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.hf_hub_download(f"{owner}/{name}", inside, repo_type="dataset"))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise DataError(f"{path}: the hub did not give this file: {error}") from error


def stamp_of(path: str) -> tuple[str, int, int, int]:
    """Return what changes with a file, and may stand for its content: its path, size, time and inode.

    Raises:
      DataError: there is no such file.
    """
    source = find_file(path).resolve()
    status = source.stat()
    return str(source), status.st_size, status.st_mtime_ns, status.st_ino


def read_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSON-lines file with their places (``FILE line N``) for error messages.

    Blank lines are skipped.

    Raises:
      DataError: the file does not exist or is damaged, or a line is not UTF-8 or no JSON object.
    """
    source = find_file(path)
    with source.open("rb") as probe:
        is_gzip = probe.read(2) == b"\x1f\x8b"
    place = f"{path} line 1"
    try:
        with gzip.open(source, "rb") if is_gzip else source.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                place = f"{path} line {number}"
                if line.strip():
                    yield place, _read_object(line, place)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{place}: broken gzip file: {error}") from error


def require_text(row: dict[str, Any], key: str, place: str) -> str:
    """Return a field that must be a non-blank text; a number is converted to text.

    Raises:
      DataError: the field is missing, of another type, or blank.
    """
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {key!r} is {value!r:.80}; expected text")
    return value


def _read_object(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: {type(row).__name__}; expected a JSON object")
    return row
