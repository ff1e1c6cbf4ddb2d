"""Sources of questions: embedded worlds, or files with a corpus or a search server."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from empg_envs.deepsearch import worlds
from empg_envs.deepsearch.bm25 import BuiltinBm25
from empg_envs.deepsearch.ondisk import open_index
from empg_envs.deepsearch.pages import MemoryPages, Pages, open_pages
from empg_envs.deepsearch.passages import Passage, Retriever, load_corpus, make_retriever
from empg_envs.deepsearch.questions import Panels, Question, list_files, make_panels
from empg_envs.deepsearch.tables import KIND_OF_VALUE, LEVELS, Level
from empg_envs.deepsearch.texts import TEXTS, Texts
from empg_envs.rows import stamp_of

FILE_RETRIEVER = "bm25s"


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """A question with the search engine for its answer.

    Attributes:
      question: text and golden answers.
      retriever: the search engine.
      pages: the pages of its passages, where they can be browsed.
      content_hash: hash that identifies the task.
      puzzle: the embedded world, or None for a question from a file.
      passages: the corpus of the embedded world.
    """

    question: Question
    retriever: Retriever
    content_hash: str
    pages: Pages | None = None
    puzzle: worlds.Puzzle | None = None
    passages: tuple[Passage, ...] = ()


class Source(Protocol):
    """Panels of tasks."""

    def list_splits(self) -> list[str]:
        """Return the names of the panels."""
        ...

    def num_tasks(self, split: str) -> int:
        """Return the size of a panel."""
        ...

    def load(self, split: str, index: int) -> Task:
        """Return one task."""
        ...

    def panel_hash(self, split: str) -> str:
        """Return the hash that identifies a panel."""
        ...


class EmbeddedSource:
    """A source of generated worlds. Each task has its own corpus and its own index over names."""

    def __init__(self, level: Level, style: str) -> None:
        """Set the level and the style; the style affects only the texts, not the worlds."""
        self._level, self._style = level, style

    def list_splits(self) -> list[str]:
        """Return ``train``, ``valid``, ``test``, ``test_ood``."""
        return list(worlds.SPLITS)

    def num_tasks(self, split: str) -> int:
        """Return the size of a panel."""
        return worlds.num_tasks(self._level, split)

    def load(self, split: str, index: int) -> Task:
        """Generate a task; it is cached, because a group plays the same task several times."""
        self.num_tasks(split)
        return _load_world(self._level.name, self._style, split, index)

    def panel_hash(self, split: str) -> str:
        """Return the hash of all worlds of a panel; generates them once."""
        self.num_tasks(split)
        return worlds.panel_hash(self._level.name, split)


class FileSource:
    """A source of questions from files with one common retriever."""

    def __init__(self, panels: Panels, retriever: Retriever, pages: Pages | None = None) -> None:
        """Store panels, retriever and pages; `open_files` builds them."""
        self._panels, self._retriever, self._pages = panels, retriever, pages

    def list_splits(self) -> list[str]:
        """Return the panels that the files give."""
        return self._panels.splits

    def num_tasks(self, split: str) -> int:
        """Return the size of a panel."""
        return self._panels.num_tasks(split)

    def load(self, split: str, index: int) -> Task:
        """Return a question with the common retriever."""
        question = self._panels.get(split, index)
        return Task(question, self._retriever, question.content_hash, self._pages)

    def panel_hash(self, split: str) -> str:
        """Return the hash of a panel's questions."""
        return self._panels.panel_hash(split)


def open_files(
    questions: str | Sequence[str] | Mapping[str, Any],
    corpus: str | None,
    retriever: str | None,
    retriever_options: Mapping[str, Any] | None,
    *,
    with_pages: bool = False,
) -> FileSource:
    """Open questions and corpus from files; all environments of a process share them.

    Args:
      questions: the question files; see `make_panels`.
      corpus: the file of passages, or None.
      retriever: name of the retriever, or None for the usual one.
      retriever_options: its options.
      with_pages: whether the passages' pages are wanted too.

    Raises:
      DataError: a file is malformed.
      ValueError: a retriever needs a corpus but has none, or ``remote`` has one.
    """
    name = retriever or (FILE_RETRIEVER if corpus is not None else "remote")
    if name == "remote" and not (retriever_options or {}).get("urls"):
        raise ValueError(
            "deepsearch questions need passages: set corpus (a wiki-18 file), or retriever 'remote' with "
            "retriever_options {'urls': ['http://127.0.0.1:8000/retrieve']}"
        )
    # A file that was changed is read again.
    panels = _load_panels(json.dumps(questions), tuple(map(stamp_of, list_files(questions))))
    options = json.dumps(dict(retriever_options or {}))
    index = (retriever_options or {}).get("index")
    stamp = tuple(stamp_of(path) for path in (corpus, index) if path is not None)
    engine, _ = _load_retriever(name, corpus, options, stamp)
    return FileSource(panels, engine, _load_pages(name, corpus, options, stamp) if with_pages else None)


@functools.lru_cache(maxsize=8)
def _load_panels(questions: str, stamps: object) -> Panels:
    return make_panels(json.loads(questions))


@functools.lru_cache(maxsize=8)
def _load_retriever(
    name: str, corpus: str | None, options: str, stamp: object
) -> tuple[Retriever, Sequence[Passage]]:
    chosen = json.loads(options)
    folder = chosen.pop("index_dir", None)
    if folder is None:
        passages = None if corpus is None else load_corpus(corpus)
        return make_retriever(name, passages, **chosen), passages or ()
    if corpus is None:
        raise ValueError(
            f"index_dir={folder} keeps the index of a corpus, but retriever {name!r} has none here"
        )
    return open_index(name, corpus, folder, **chosen)


@functools.lru_cache(maxsize=8)
def _load_pages(name: str, corpus: str | None, options: str, stamp: object) -> Pages:
    engine, passages = _load_retriever(name, corpus, options, stamp)
    # Without a corpus the engine is a server's client, and the server has the pages too.
    return cast(Pages, engine) if corpus is None else open_pages(passages)


@functools.lru_cache(maxsize=1024)
def _load_world(level_name: str, style: str, split: str, index: int) -> Task:
    texts = TEXTS[style]()
    puzzle = worlds.make_puzzle(LEVELS[level_name], split, index)
    passages = write_passages(puzzle, texts)
    question = puzzle.to_question(split, index, texts.ask(puzzle.start, puzzle.relations))
    index_of_names = BuiltinBm25(passages, ignore=KIND_OF_VALUE)
    pages = MemoryPages(passages)
    return Task(question, index_of_names, puzzle.content_hash, pages, puzzle, passages)


def write_passages(puzzle: worlds.Puzzle, texts: Texts) -> tuple[Passage, ...]:
    """Write the corpus of a world in a style; ids are ``1``, ``2``, ..."""
    return tuple(
        dataclasses.replace(texts.describe(name, facts), id=str(number))
        for number, (name, facts) in enumerate(puzzle.pages.items(), start=1)
    )
