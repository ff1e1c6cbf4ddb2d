"""Passages, the corpus format of wiki-18, and the protocol of all retrievers."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from empg_envs.rows import DataError, read_rows, require_text, stamp_of

MAX_TOPK = 100
EXTRA = ".[deepsearch]"
_OTHER_EXTRAS = {"faiss": ".[faiss]", "tantivy": ".[tantivy]"}  # by package

_WORD = re.compile(r"\w+")
# English function words. They are not indexed, because they do not tell the topic of a passage.
_FUNCTION_WORDS = """
a an and are as at be but by for from had has have he her his if in into is it its no not of on or she such
that the their them then there these they this to was were what when where which who whom whose why how will
with did do does
"""
STOP_WORDS = frozenset(_FUNCTION_WORDS.split())


@dataclasses.dataclass(frozen=True, slots=True)
class Passage:
    """A passage of a corpus.

    Attributes:
      id: its name in the corpus.
      title: its title, without the quotes that wiki-18 puts around it.
      text: its text.
      is_quoted: whether `contents` has the title in quotes; a passage from a file keeps the file's spelling.
    """

    id: str
    title: str
    text: str
    is_quoted: bool = dataclasses.field(default=True, compare=False)

    @property
    def contents(self) -> str:
        """The title on the first line, in quotes where the corpus has them, then the text."""
        title = f'"{self.title}"' if self.is_quoted else self.title
        return f"{title}\n{self.text}"

    def to_row(self) -> dict[str, str]:
        """Return a line of a corpus file."""
        return {"id": self.id, "contents": self.contents}


class Hit(NamedTuple):
    """A search result and its score. Larger scores are better; the scale depends on the retriever."""

    passage: Passage
    score: float


class Retriever(Protocol):
    """The protocol of search engines, in this process or on another machine."""

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """Return at most ``topk`` passages for each query, best first.

        Raises:
          RetrieverError: the engine cannot answer. The agent is never the cause of this error.
        """
        ...

    def close(self) -> None:
        """Release resources; it may be called more than once."""
        ...


class RetrieverError(RuntimeError):
    """A failure of a search engine: it is down, too slow, or sends an invalid answer."""


# Name -> where it lives. All but the last search a corpus in this process, those of `VECTORS` by its vectors.
RETRIEVERS = {
    "builtin": ("empg_envs.deepsearch.bm25", "BuiltinBm25"),
    "bm25s": ("empg_envs.deepsearch.bm25_numpy", "NumpyBm25"),
    "tantivy": ("empg_envs.deepsearch.bm25_tantivy", "TantivyBm25"),
    "faiss": ("empg_envs.deepsearch.vectors_faiss", "FaissRetriever"),
    "vectors": ("empg_envs.deepsearch.vectors_numpy", "VectorFileRetriever"),
    "remote": ("empg_envs.deepsearch.remote", "RemoteRetriever"),
}
VECTORS = ("faiss", "vectors")


def make_retriever(name: str, passages: Sequence[Passage] | None = None, **options: Any) -> Retriever:
    """Build a retriever.

    Args:
      name: a key of `RETRIEVERS`.
      passages: the corpus; None for ``remote``, whose server has its own corpus.
      **options: options of that retriever.

    Raises:
      ValueError: the name or an option is unknown, the corpus is missing or not allowed, or a package is not
        installed.
    """
    if name not in RETRIEVERS:
        raise ValueError(f"unknown retriever {name!r}; the retrievers are {', '.join(RETRIEVERS)}")
    if (passages is None) != (name == "remote"):
        needs = "has its own corpus on the server" if name == "remote" else "needs a corpus"
        raise ValueError(f"retriever {name!r} {needs}")
    build = find_retriever(name)
    given = () if passages is None else (passages,)
    try:
        inspect.signature(build).bind(*given, **options)
    except TypeError as error:
        raise ValueError(f"retriever {name!r}: wrong retriever_options: {error}") from None
    retriever: Retriever = build(*given, **options)
    return retriever


def find_retriever(name: str) -> Any:
    """Return the class of a retriever.

    Raises:
      ValueError: a package is not installed.
    """
    module, attribute = RETRIEVERS[name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"retriever {name!r} needs the package {error.name!r}: in the clone: pip install -e "
            f"'{_OTHER_EXTRAS.get(str(error.name), EXTRA)}', "
            "or use retriever 'builtin'"
        ) from error


def read_corpus(path: str) -> list[Passage]:
    """Read a whole corpus; see `iterate_corpus`."""
    return list(iterate_corpus(path))


def iterate_corpus(path: str) -> Iterator[Passage]:
    """Read a corpus: JSON lines, also gzipped, with ``id`` and ``contents`` (or ``title`` and ``text``).

    Raises:
      DataError: a line is malformed or repeats an id, or the file is empty.
    """
    seen: dict[str, str] = {}
    for place, row in read_rows(path):
        key = require_text(row, "id", place)
        if key in seen:
            raise DataError(f"{place}: id {key!r} occurs before, in {seen[key]}")
        seen[key] = place
        if "contents" in row:
            yield parse_contents(key, require_text(row, "contents", place))
        else:
            title, text = require_text(row, "title", place), require_text(row, "text", place)
            yield Passage(key, title, text, is_quoted=False)
    if not seen:
        raise DataError(f"{path}: no passages; expected one JSON object per line")


def parse_contents(key: str, contents: str) -> Passage:
    """Split contents of the form ``"Title"`` + newline + text; the quotes may be missing."""
    title, _, text = contents.partition("\n")
    title = title.strip()
    is_quoted = len(title) > 1 and title[0] == title[-1] == '"'
    return Passage(key, title[1:-1] if is_quoted else title, text.strip(), is_quoted=is_quoted)


def words_of(text: str) -> list[str]:
    """Return the search terms of a text: lower-case words without accents and without function words."""
    return [word for word in _WORD.findall(_fold(text)) if word not in STOP_WORDS]


def index_words(passage: Passage) -> list[str]:
    """Return the search terms of a passage. The title counts twice, because it tells the topic."""
    return words_of(passage.title) * 2 + words_of(passage.text)


def check_topk(topk: int) -> int:
    """Check and return ``topk``.

    Raises:
      ValueError: it is not an integer in 1 to `MAX_TOPK`.
    """
    if not isinstance(topk, int) or isinstance(topk, bool) or not 1 <= topk <= MAX_TOPK:
        raise ValueError(f"topk is {topk!r}; expected an integer from 1 to {MAX_TOPK}")
    return topk


def _fold(text: str) -> str:
    if text.isascii():
        return text.lower()
    decomposed = unicodedata.normalize("NFKD", text.lower())
    return "".join(character for character in decomposed if not unicodedata.combining(character))


def load_corpus(path: str) -> tuple[Passage, ...]:
    """Read a corpus once per process (`read_corpus`), because a worker's environments share it."""
    return _load_corpus(path, stamp_of(path))


@functools.lru_cache(maxsize=8)
def _load_corpus(path: str, stamp: object) -> tuple[Passage, ...]:
    return tuple(read_corpus(path))
