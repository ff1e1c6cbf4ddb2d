"""Corpora and their indexes on disk: built once, then opened in a moment and shared by all processes.

The folder of an index holds the passages (a line of JSON each, and their places) and what the search engine
saved. Both are mapped into memory, so that a process keeps only what it reads. The folder's name is made from
the content of the corpus, the engine and its options.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, overload

from empg_envs.cache import allow_mapping, build_once
from empg_envs.deepsearch.passages import (
    VECTORS,
    Passage,
    Retriever,
    find_retriever,
    iterate_corpus,
    make_retriever,
)
from empg_envs.rows import find_files, stamp_of

VERSION = 1  # of the layout; a folder of another version is built again
ENGINES = ("bm25s", "tantivy")
_BLOCK = 1 << 20


class Engine(Protocol):
    """A search engine that can keep its index in a folder."""

    def __call__(self, passages: Sequence[Passage], *, folder: Path, **options: Any) -> Retriever:
        """Open the index in a folder."""
        ...

    def build(self, passages: Iterable[Passage], folder: Path, **options: Any) -> None:
        """Write the index of these passages to a new folder."""
        ...


def open_index(
    name: str, corpus: str, root: str | os.PathLike[str], **options: Any
) -> tuple[Retriever, Sequence[Passage]]:
    """Open the index of a corpus; build it first if it is not there.

    Of an engine that has an index of vectors already (`VECTORS`), only the passages are kept in the folder.

    Args:
      name: the search engine, one of `ENGINES` or `VECTORS`.
      corpus: a file in the format of wiki-18.
      root: folder of the indexes.
      **options: options of the search engine.

    Raises:
      DataError: the corpus is malformed.
      ValueError: the engine keeps no index on disk, its package is not installed, or the folder cannot be
        written.
    """
    if name in VECTORS:
        passages = PassageFile(_build_folder("passages", corpus, root, {}, lambda folder: None))
        return make_retriever(name, passages, **options), passages
    if name not in ENGINES:
        raise ValueError(f"retriever {name!r} keeps no index on disk (index_dir); {' and '.join(ENGINES)} do")
    engine: Engine = find_retriever(name)

    def index(folder: Path) -> None:
        engine.build(PassageFile(folder), folder / "index", **options)

    folder = _build_folder(name, corpus, root, options, index)
    passages = PassageFile(folder)
    return engine(passages, folder=folder / "index", **options), passages


def _build_folder(
    name: str,
    corpus: str,
    root: str | os.PathLike[str],
    options: Mapping[str, Any],
    index: Callable[[Path], None],
) -> Path:
    """Return the folder of a corpus for an engine; if it is not there, write and ``index`` the passages."""
    base = Path(root).expanduser()

    def build(unfinished: Path) -> None:
        unfinished.mkdir()
        write_passages(unfinished, iterate_corpus(corpus))
        index(unfinished)

    try:
        base.mkdir(parents=True, exist_ok=True)
        key = json.dumps([VERSION, name, sorted(options.items()), _hash_corpus(corpus, base)])
        return build_once(base / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}", build)
    except OSError as error:
        raise ValueError(f"index_dir={root}: {error.strerror or error} ({error.filename})") from error


def write_passages(folder: Path, passages: Iterable[Passage]) -> None:
    """Write passages into a folder, for `PassageFile`."""
    ends = array("Q")
    with (folder / "passages.jsonl").open("wb") as file:
        for passage in passages:
            fields = [passage.id, passage.title, passage.text, passage.is_quoted]
            file.write(json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            ends.append(file.tell())
    (folder / "ends.bin").write_bytes(ends.tobytes())


class PassageFile(Sequence[Passage]):
    """The passages of a folder, each of which is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Map the files of a folder into memory."""
        self.folder = folder
        self._lines = _map(folder / "passages.jsonl")
        self._ends = memoryview(_map(folder / "ends.bin")).cast("Q")

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(self._ends)

    @overload
    def __getitem__(self, number: int) -> Passage: ...
    @overload
    def __getitem__(self, number: slice) -> list[Passage]: ...
    def __getitem__(self, number: int | slice) -> Passage | list[Passage]:
        """Read a passage, or several."""
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        place = range(len(self))[number]
        line = self._lines[self._ends[place - 1] if place else 0 : self._ends[place]]
        key, title, text, is_quoted = json.loads(line.decode("utf-8", "surrogatepass"))
        return Passage(key, title, text, is_quoted=is_quoted)

    def __iter__(self) -> Iterator[Passage]:
        """Read the passages one after another."""
        return (self[number] for number in range(len(self)))


def _map(path: Path) -> mmap.mmap:
    allow_mapping(path)
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _hash_corpus(corpus: str, root: Path) -> str:
    """Hash the content of a corpus; a file that is as it was (size, time, inode) is not read again."""
    stamp = hashlib.sha256(repr(stamp_of(corpus)).encode()).hexdigest()[:24]

    def read(unfinished: Path) -> None:
        digest = hashlib.sha256()
        for path, _, _ in find_files(corpus):
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        unfinished.write_text(digest.hexdigest(), encoding="utf-8")

    return build_once(root / f"corpus-{stamp}.sha256", read).read_text(encoding="utf-8")
