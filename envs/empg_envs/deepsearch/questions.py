"""Questions in FlashRAG's format, or in that of a public set, and their panels.

The questions of a file are split into train, valid and test (8 : 1 : 1) by their hashes, or all belong to the
panel that the configuration names. A question whose words are in both a training and a held-out panel is
dropped from training. Held-out panels keep questions of the same words with other answers or of other groups.
Where a held-out panel has several groups, each is a panel too: ``test:nq`` is what ``test`` has of the group
``nq``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from empg_envs.deepsearch.question_rows import read_fields
from empg_envs.rows import DataError, read_rows, stem_of

TRAIN = "train"
_SHARES = {TRAIN: (0.0, 0.8), "valid": (0.8, 0.9), "test": (0.9, 1.0)}
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """A question with its accepted answers.

    Attributes:
      id: id in the question's file.
      text: the question.
      golden_answers: accepted answers; one match is enough.
      group: group of the reported scores: a data set's name, or a number of hops.
      metadata: other JSON-able fields of the file.
    """

    id: str
    text: str
    golden_answers: tuple[str, ...]
    group: str = ""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def content_hash(self) -> str:
        """Hash of the question's words."""
        return hashlib.sha256(" ".join(self.text.lower().split()).encode()).hexdigest()

    def to_row(self) -> dict[str, Any]:
        """Return the question in FlashRAG's format."""
        return {
            "id": self.id,
            "question": self.text,
            "golden_answers": list(self.golden_answers),
            "metadata": dict(self.metadata),
        }


def read_questions(path: str, group: str = "") -> list[Question]:
    """Read a question file; `empg_envs.deepsearch.question_rows` has the forms of its rows.

    Args:
      path: the file, or a data set of the hub; see `empg_envs.rows`.
      group: the questions' group; the default is the row's ``data_source`` (Search-R1's merged files), else
        the name of the file, without its endings, or of the data set.

    Raises:
      DataError: a line is malformed, or the file is empty.
    """
    questions = []
    stem = stem_of(path)
    for number, (place, row) in enumerate(read_rows(path), start=1):
        fields = read_fields(row, place, number)
        metadata = row.get("metadata")
        if metadata is not None and not isinstance(metadata, dict):
            raise DataError(f"{place}: 'metadata' is {metadata!r:.80}; expected an object")
        questions.append(
            Question(
                id=fields.id,
                text=fields.text,
                golden_answers=fields.answers,
                group=group or str(row.get("data_source") or stem),
                metadata=metadata or {},
            )
        )
    if not questions:
        raise DataError(f"{path}: no questions; expected one JSON object per line")
    return questions


class Panels:
    """Ordered lists of questions by split."""

    def __init__(self, panels: Mapping[str, Sequence[Question]]) -> None:
        """Drop duplicates inside a panel, and training questions that a held-out panel contains.

        Duplicates have the same words; in held-out panels the same group and answers, too.

        Raises:
          DataError: a panel is empty afterwards.
        """
        held_out = {
            question.content_hash
            for split, questions in panels.items()
            if split != TRAIN
            for question in questions
        }
        self._panels: dict[str, list[Question]] = {}
        for split, questions in panels.items():
            kept: dict[tuple[Any, ...], Question] = {}
            for question in questions:
                if split != TRAIN:
                    key = (question.content_hash, question.group, question.golden_answers)
                    kept.setdefault(key, question)
                elif question.content_hash not in held_out:
                    kept.setdefault((question.content_hash,), question)
            dropped = sum(question.content_hash in held_out for question in questions)
            if split == TRAIN and dropped:
                _log.warning("%d training questions are left out: held-out panels ask them, too", dropped)
            if not kept:
                raise DataError(f"panel {split!r} holds no question")
            # Sort by hash: the files may be sorted by topic, and their order must not matter.
            self._panels[split] = [kept[key] for key in sorted(kept)]
        for split in [split for split in self._panels if split != TRAIN]:
            self._add_groups(split)

    def _add_groups(self, split: str) -> None:
        """Add a panel for each of several groups of a panel; inside of it there are no groups."""
        if len({question.group for question in self._panels[split]}) < 2:
            return
        for question in self._panels[split]:
            inside = self._panels.setdefault(f"{split}:{question.group}", [])
            inside.append(dataclasses.replace(question, group=""))

    @property
    def splits(self) -> list[str]:
        """Names of the panels, and behind them those of the held-out panels' groups."""
        return list(self._panels)

    def num_tasks(self, split: str) -> int:
        """Return the size of a panel.

        Raises:
          ValueError: there is no such split.
        """
        if split not in self._panels:
            raise ValueError(f"unknown split {split!r}; the splits are {', '.join(self._panels)}")
        return len(self._panels[split])

    def get(self, split: str, index: int) -> Question:
        """Return one question.

        Raises:
          ValueError: there is no such split.
          IndexError: index outside the panel.
        """
        count = self.num_tasks(split)
        index = operator.index(index)
        if not 0 <= index < count:
            raise IndexError(f"task index {index} of split {split!r} is outside [0, {count})")
        return self._panels[split][index]

    def panel_hash(self, split: str) -> str:
        """Return the hash of the ordered content hashes of a panel: the panel's identity."""
        digest = hashlib.sha256()
        for index in range(self.num_tasks(split)):
            digest.update(self._panels[split][index].content_hash.encode())
        return digest.hexdigest()


def make_panels(files: str | Sequence[str] | Mapping[str, Any]) -> Panels:
    """Read question files into panels.

    Args:
      files: one file or several, which are split by hash into train, valid and test; or a mapping from the
        name of a panel to its file or files. Such a name may contain a group after a colon
        (``test:hotpotqa``), under which success is also reported and evaluated by itself. The default group
        is the name of the question's file.

    Raises:
      DataError: a file is malformed, or a panel is empty.
    """
    if isinstance(files, Mapping):
        panels: dict[str, list[Question]] = {}
        for name, paths in files.items():
            split, _, group = str(name).partition(":")
            panels.setdefault(split, []).extend(
                question for path in _as_list(paths) for question in read_questions(path, group)
            )
        return Panels(panels)
    pooled = [question for path in _as_list(files) for question in read_questions(path)]
    by_split: dict[str, list[Question]] = {split: [] for split in _SHARES}
    for question in pooled:
        share = int(question.content_hash[:8], 16) / 2**32
        split = next(name for name, (low, high) in _SHARES.items() if low <= share < high)
        by_split[split].append(question)
    return Panels({split: questions for split, questions in by_split.items() if questions})


def list_files(files: str | Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Return all files that `make_panels` would read."""
    named = files.values() if isinstance(files, Mapping) else [files]
    return [path for paths in named for path in _as_list(paths)]


def _as_list(paths: str | Sequence[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else [str(path) for path in paths]
