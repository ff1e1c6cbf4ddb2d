"""Rows of task files: JSON lines, JSON lists, parquet, and data sets of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HUB = "hub:"
SPLIT_WORDS = {"train": "train", "valid": "valid", "validation": "valid", "dev": "dev", "test": "test"}
# What a task is made of. The files of R2E-Gym hold much more, of which every worker would keep a copy.
SWE_COLUMNS = (*("instance_id", "repo", "base_commit", "problem_statement", "FAIL_TO_PASS", "PASS_TO_PASS"),)
R2E_COLUMNS = ("repo_name", "docker_image", "problem_statement", "expected_output_json")
OTHER_COLUMNS = (
    *("patch", "test_patch", "bug_patch", "version", "runner", "test_path", "test_cmd", "image", "split"),
    "commit_hash",
    "install_cmd",
)
BATCH_ROWS = 64


class TaskError(ValueError):
    """A malformed task row or file."""


def read_source(source: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a source.

    Args:
      source: a file of JSON lines, a JSON file with a list, a parquet file (``FILE.parquet``), or a data set
        of the Hugging Face hub with parquet or JSON-lines files: ``hub:owner/name[@revision][:split]``.

    Raises:
      TaskError: the source cannot be read, or a row is malformed; the message names the place.
    """
    if not str(source).startswith(HUB):
        yield from _read_file(Path(source), str(source))
        return
    for path, place, split in find_hub_files(str(source)):
        for row in _read_file(path, place):
            yield {**row, "split": row.get("split") or split} if split else row


def _read_file(path: Path, place: str) -> Iterator[dict[str, Any]]:
    return _read_parquet(path, place) if path.suffix == ".parquet" else read_rows(path)


def _read_parquet(path: Path, place: str) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise TaskError(f"cannot read the tasks file {place!r}: there is no such file")
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise TaskError(
            f"{place}: parquet files need the package pyarrow ({error}); "
            "in the clone: pip install -e '.[parquet]'"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            needed = R2E_COLUMNS if "expected_output_json" in names else SWE_COLUMNS
            missing = [name for name in needed if name not in names]
            if missing:
                raise TaskError(f"{place}: no column {missing[0]!r}; its columns are {', '.join(names)}")
            columns = [name for name in names if name in (*SWE_COLUMNS, *R2E_COLUMNS, *OTHER_COLUMNS)]
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise TaskError(f"{place}: no parquet file ({str(error).splitlines()[0]})") from error


def find_hub_files(source: str) -> list[tuple[Path, str, str | None]]:
    """Find the files of a data set on the hub, downloaded into the hub's cache, which goes by commits.

    Args:
      source: ``hub:owner/name[@revision][:split]``.

    Returns:
      Path, name for messages and split of each file; the split is None where the name does not tell.

    Raises:
      TaskError: the source is misspelled, the data set cannot be had, or has no fitting file.
    """
    form = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?:@([^:]+))?(?::([\w.-]+))?", source)
    if form is None:
        raise TaskError(f"tasks {source!r}: the form is hub:owner/name[@revision][:split]")
    name, revision, split = form.groups()
    folder = _download(name, revision)
    found = sorted(path for path in folder.rglob("*") if path.suffix in (".parquet", ".jsonl"))
    found = [path for path in found if path.suffix == found[0].suffix] if found else []
    inside = {path: path.relative_to(folder).as_posix() for path in found}
    fitting = [path for path in found if split is None or _is_of(inside[path], split)]
    if not fitting:
        what = "parquet or .jsonl file" if split is None else f"file of split {split!r}"
        there = f"; there are {', '.join(inside.values())}" if inside else ""
        raise TaskError(f"{source}: the data set has no {what}{there}")
    return [(path, f"{source}, {inside[path]}", split or _split_of(inside[path])) for path in fitting]


def _download(name: str, revision: str | None) -> Path:
    """Return the folder of the files of a data set."""
    import huggingface_hub  # imported late, because only downloads need it
    from huggingface_hub import errors

    place = f"{HUB}{name}" + (f"@{revision}" if revision else "")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, repo_type="dataset", revision=revision, allow_patterns=["*.parquet", "*.jsonl"]
            )
        )
    except errors.RevisionNotFoundError as error:
        raise TaskError(f"{place}: the data set has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise TaskError(f"{place}: the hub has no such data set, or it is private (hf auth login)") from error
    except errors.LocalEntryNotFoundError as error:
        raise TaskError(
            f"{place}: the hub cannot be reached, and its cache does not have the data set "
            f"({error.__cause__ or error})"
        ) from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise TaskError(f"{place}: the hub did not give the data set: {first}") from error


def _is_of(path: str, split: str) -> bool:
    """Whether a name has the split as a word, as in ``data/test-00000-of-00001.parquet``."""
    return re.search(rf"(?<![a-z0-9]){re.escape(split.lower())}(?![a-z0-9])", path.lower()) is not None


def _split_of(path: str) -> str | None:
    return next((split for word, split in SPLIT_WORDS.items() if _is_of(path, word)), None)


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON-lines file, or of a JSON file with a list.

    Raises:
      TaskError: a row is malformed; the message names the file and the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise TaskError(f"cannot read the tasks file {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"the tasks file {str(path)!r} is no text in UTF-8 ({error})") from None
    if text.lstrip().startswith("["):
        listed = enumerate(_parse_json(text, str(path)))
        yield from (_as_row(row, f"{path}: entry {number} of the list") for number, row in listed)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield _as_row(_parse_json(line, place), place)


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{place}: not JSON ({error})") from None


def _as_row(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise TaskError(f"{place}: expected an object, not {type(row).__name__}")
    return row
