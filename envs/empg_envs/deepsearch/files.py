"""A reader of files of rows, on disk or in a data set of the Hugging Face hub.

The rows are lines of JSON or one JSON array, plain or gzipped, or a parquet file. The content tells which.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

HUB = "hub:"
EXTRA = ".[parquet]"
_PARQUET = b"PAR1"
_GZIP = b"\x1f\x8b"
_HEAD = 256  # first bytes, which tell the form
_ARRAY = re.compile(rb"\s*\[")
_WRAPPED = re.compile(rb'\s*\{\s*"[Dd]ata"\s*:\s*\[')  # TriviaQA's own files


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
    """Yield the rows of a file with their places (``FILE line N``) for error messages.

    Blank lines are skipped. Only a JSON array is read as a whole.

    Raises:
      DataError: the file does not exist or is damaged, a line is not UTF-8 or no JSON object, or the package
        for parquet files is not installed.
    """
    source = find_file(path)
    with source.open("rb") as probe:
        head = probe.read(len(_PARQUET))
    if head == _PARQUET:
        yield from _read_parquet(source, path)
        return
    place = f"{path} line 1"
    try:
        with gzip.open(source, "rb") if head.startswith(_GZIP) else source.open("rb") as lines:
            read = _read_array if _is_array(lines) else _read_lines
            for place, row in read(lines, path):
                yield place, row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{place}: broken gzip file: {error}") from error


def _is_array(file: BufferedIOBase) -> bool:
    head = file.read(_HEAD)
    file.seek(0)
    return bool(_WRAPPED.match(head) or _ARRAY.match(head))


def _read_lines(lines: BufferedIOBase, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        place = f"{path} line {number}"
        if line.strip():
            yield place, _check_object(_parse(line, place), place)


def _read_array(file: BufferedIOBase, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    whole = _parse(file.read(), path)
    rows = whole if isinstance(whole, list) else next(whole[key] for key in ("Data", "data") if key in whole)
    for number, row in enumerate(rows, start=1):
        place = f"{path} row {number}"
        yield place, _check_object(row, place)


def _read_parquet(source: Path, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path} is a parquet file, which needs the package {error.name!r}: "
            f"in the clone: pip install -e '{EXTRA}'"
        ) from error
    try:
        file, number = pyarrow.parquet.ParquetFile(source), 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: broken parquet file: {error}") from error


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


def _parse(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {error}") from error


def _check_object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{place}: {type(row).__name__}; expected a JSON object")
    return row
