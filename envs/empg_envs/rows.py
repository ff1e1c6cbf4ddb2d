"""A reader of files of rows (tasks, questions, passages), on disk or in a data set of the Hugging Face hub.

The rows are lines of JSON or one JSON array, plain or gzipped, or a parquet file. The content tells which.

A source is a file, or ``hub:owner/name[@revision][/path/in/data/set][:split]``, which is downloaded to the
hub's cache. Without a path it is all parquet files of the data set, or else all ``.jsonl`` files; with a
split those of them whose names have it as a word. With a path the split tells what the file's rows belong
to. A slash in a branch's name is spelled ``%2F``.
"""

from __future__ import annotations

import glob
import gzip
import itertools
import json
import os
import re
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

FORM = "hub:owner/name[@revision][/path/in/data/set][:split]"
EXTRA = ".[parquet]"
SPLIT_WORDS = {"train": "train", "valid": "valid", "validation": "valid", "dev": "valid", "test": "test"}
_SOURCE = re.compile(
    r"hub:(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:convert/\w+|pr/\d+)|[^/:]+))?"
    r"(?:/(?P<path>[^:]+))?(?::(?P<split>[\w.-]+))?"
)
_PARQUET = b"PAR1"
_GZIP = b"\x1f\x8b"
_HEAD = 256  # first bytes, which tell the form
_ARRAY = re.compile(rb"\s*\[")
_WRAPPED = re.compile(rb'\s*\{\s*"[Dd]ata"\s*:\s*\[')  # TriviaQA's own files
_BATCH_ROWS = 256  # of a parquet file; some rows of R2E-Gym are large


class DataError(ValueError):
    """An unusable source, file or row. The message gives file, place and cause."""


class File(NamedTuple):
    """A file of a source, its name for messages, and on the hub its split, where a name tells it."""

    path: Path
    place: str
    split: str | None


class Columns(NamedTuple):
    """The columns that are read of a parquet file: without a needed one it is refused."""

    needed: Sequence[str]
    others: Sequence[str]


Choose = Callable[[Sequence[str]], Columns]  # from the columns that a file has


def find_files(source: str | Path) -> list[File]:
    """Find the files of a source, and download those of the hub.

    Raises:
      DataError: the source is misspelled, there is no such file or data set, or the hub cannot be reached.
    """
    named = str(source)
    if not named.startswith("hub:"):
        local = Path(os.path.expanduser(source))
        if not local.is_file():
            raise DataError(f"no file {named} (of a data set on the hub: {FORM})")
        return [File(local, named, None)]
    form = _SOURCE.fullmatch(named)
    if form is None:
        raise DataError(f"{named!r} names no data set on the hub: the form is {FORM}")
    inside, split = form["path"], form["split"]
    revision = form["revision"] and urllib.parse.unquote(form["revision"])
    folder = _download(named, form["name"], revision, inside)
    if inside is not None:
        if not (folder / inside).is_file():
            raise DataError(f"{named}: the data set has no such file")
        return [File(folder / inside, named, split or _split_of(inside))]
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".parquet", ".jsonl"))
    names = {path.relative_to(folder).as_posix(): path for path in paths if path.suffix == paths[0].suffix}
    fitting = [name for name in names if split is None or _is_of(name, split)]
    if not fitting:
        what = "parquet or .jsonl file" if split is None else f"file of split {split!r}"
        there = f"; there are {', '.join(names)}" if names else ""
        raise DataError(f"{named}: the data set has no {what}{there}")
    return [File(names[name], f"{named}, {name}", split or _split_of(name)) for name in fitting]


def find_file(source: str) -> Path:
    """Return the only file of a source; see `find_files`.

    Raises:
      DataError: there is no such file, or the source has several.
    """
    files = find_files(source)
    if len(files) > 1:
        raise DataError(f"{source} has {len(files)} files; expected the path of one: {FORM}")
    return files[0].path


def stamp_of(source: str) -> tuple[tuple[str, int, int, int], ...]:
    """Return what changes with the files of a source, and may stand for their content.

    It is the path, size, time and inode of each.

    Raises:
      DataError: there is no such file.
    """
    paths = [file.path.resolve() for file in find_files(source)]
    found = [(str(path), path.stat()) for path in paths]
    return tuple((path, status.st_size, status.st_mtime_ns, status.st_ino) for path, status in found)


def stem_of(source: str) -> str:
    """Return the name of a source's file without its endings, or of its data set where no file is named."""
    form = _SOURCE.fullmatch(source)
    name: str = source if form is None else form["path"] or form["name"]
    return name.rpartition("/")[2].partition(".")[0]


def _download(source: str, name: str, revision: str | None, inside: str | None) -> Path:
    """Return the folder of a data set, with one file or all that may have rows."""
    import huggingface_hub  # only when something is to be downloaded
    from huggingface_hub import errors

    # A single file is asked for in the same way, so that the cache keeps the list of what it then lacks.
    wanted = ["*.parquet", "*.jsonl"] if inside is None else [glob.escape(inside)]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, repo_type="dataset", revision=revision, allow_patterns=wanted
            )
        )
    except errors.RevisionNotFoundError as error:
        raise DataError(f"{source}: the data set has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"{source}: the hub has no such data set, or it is private (hf auth login)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise DataError(
            f"{source}: the hub cannot be reached, and its cache does not have this "
            f"({error.__cause__ or error})"
        ) from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise DataError(f"{source}: the hub did not give this: {first}") from error


def _is_of(name: str, split: str) -> bool:
    """Whether a name has the split as a word, as in ``data/test-00000-of-00001.parquet``."""
    return re.search(rf"(?<![a-z0-9]){re.escape(split.lower())}(?![a-z0-9])", name.lower()) is not None


def _split_of(name: str) -> str | None:
    return next((split for word, split in SPLIT_WORDS.items() if _is_of(name, word)), None)


def read_rows(source: str | Path, choose: Choose | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a source with their places (``FILE line N``, ``FILE row N``) for error messages.

    Blank lines are skipped. Only a JSON array is read as a whole. Rows of a hub's data set get the field
    ``split`` where they have none and it is known.

    Args:
      source: a file, or a data set of the hub; see this module.
      choose: chooses the columns of parquet files, of which each has the rest skipped; None reads all.

    Raises:
      DataError: see `find_files`; or a file is damaged, lacks a column, a line is no JSON object, or the
        package for parquet files is not installed.
    """
    for path, name, split in find_files(source):
        for place, row in _read_file(path, name, choose):
            if split and not row.get("split"):
                row["split"] = split
            yield place, row


def _read_file(path: Path, name: str, choose: Choose | None) -> Iterator[tuple[str, dict[str, Any]]]:
    place = f"{name} line 1"
    try:
        with path.open("rb") as probe:
            head = probe.read(len(_PARQUET))
        if head == _PARQUET or path.suffix == ".parquet":
            yield from _read_parquet(path, name, choose)
            return
        with gzip.open(path, "rb") if head.startswith(_GZIP) else path.open("rb") as lines:
            read = _read_array if _is_array(lines) else _read_lines
            for place, row in read(lines, name):
                yield place, row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{place}: broken gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{name}: cannot read this file: {error.strerror or error}") from error


def _is_array(file: BufferedIOBase) -> bool:
    head = file.read(_HEAD)
    file.seek(0)
    return bool(_WRAPPED.match(head) or _ARRAY.match(head))


def _read_lines(lines: BufferedIOBase, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        place = f"{name} line {number}"
        if line.strip():
            yield place, _check_object(_parse(line, place), place)


def _read_array(file: BufferedIOBase, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    whole = _parse(file.read(), name)
    rows = whole if isinstance(whole, list) else next(whole[key] for key in ("Data", "data") if key in whole)
    for number, row in enumerate(rows, start=1):
        place = f"{name} row {number}"
        yield place, _check_object(row, place)


def _read_parquet(path: Path, name: str, choose: Choose | None) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(
            f"{name} is a parquet file, which needs the package 'pyarrow': "
            f"in the clone: pip install -e '{EXTRA}' ({error})"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            columns = None if choose is None else _choose(file.schema_arrow.names, name, choose)
            batches = file.iter_batches(_BATCH_ROWS, columns=columns)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, start=1):
                yield f"{name} row {number}", row
    except (ArrowException, OSError) as error:
        raise DataError(f"{name}: broken parquet file: {str(error).partition(chr(10))[0]}") from error


def _choose(there: list[str], name: str, choose: Choose) -> list[str]:
    columns = choose(there)
    missing = [column for column in columns.needed if column not in there]
    if missing:
        raise DataError(f"{name}: no column {missing[0]!r}; its columns are {', '.join(there)}")
    return [column for column in there if column in columns.needed or column in columns.others]


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
