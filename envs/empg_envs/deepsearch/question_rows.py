"""Rows of the public question sets: which fields hold the id, the question and the accepted answers.

FlashRAG's fields come first: ``id``, ``question``, ``golden_answers``. As their authors publish them, NQ-open
has ``answer`` (a list), TriviaQA ``answer`` with ``value`` and ``aliases``, PopQA
``possible_answers`` (JSON in a text), HotpotQA and 2WikiMultihopQA ``_id`` and ``answer``, MuSiQue ``answer``
and ``answer_aliases``, Bamboogle ``Question`` and ``Answer``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from empg_envs.rows import DataError, require_text

_IDS = ("id", "_id", "question_id", "QuestionId")
_QUESTIONS = ("question", "Question")
_ANSWERS = ("golden_answers", "possible_answers", "answer", "answers", "Answer")
_FLASHRAG = _ANSWERS[0]


class Fields(NamedTuple):
    """The id, the question and the accepted answers of a row."""

    id: str
    text: str
    answers: tuple[str, ...]


def read_fields(row: dict[str, Any], place: str, number: int) -> Fields:
    """Read the fields of a row in the form of one of the sets.

    Args:
      row: the row.
      place: where it is, for messages.
      number: its number, which is the id where the set has none.

    Raises:
      DataError: a field is missing or malformed, or the row is no answerable question.
    """
    if row.get("answerable") is False:
        raise DataError(f"{place}: 'answerable' is false; expected the answerable questions (musique_ans)")
    key = _find(row, _ANSWERS, place)
    name = next((each for each in _IDS if each in row), None)
    if name is None and key == _FLASHRAG:
        name = _IDS[0]  # a row of FlashRAG without an id is a damaged one
    aliases = _list_aliases(row, "answer_aliases", place)
    answers = [*_list_answers(row[key], key, place), *filter(_is_answer, aliases)]
    return Fields(
        id=str(number) if name is None else require_text(row, name, place),
        text=require_text(row, _find(row, _QUESTIONS, place), place).strip(),
        answers=tuple(dict.fromkeys(answers)),
    )


def _find(row: Mapping[str, Any], names: Sequence[str], place: str) -> str:
    found = next((name for name in names if name in row), None)
    if found is None:
        raise DataError(
            f"{place}: {names[0]!r} is missing, as are {', '.join(names[1:])}; it has {sorted(row)}"
        )
    return found


def _list_answers(value: Any, key: str, place: str) -> list[str]:
    given = value
    if key == "possible_answers" and isinstance(value, str):
        try:
            given = json.loads(value)
        except ValueError:
            given = None
    if isinstance(value, dict):  # TriviaQA
        names = [("value", "aliases"), ("Value", "Aliases")]
        found = [(value[one], _list_aliases(value, more, place)) for one, more in names if one in value]
        given = [each for one, more in found for each in (one, *more)]
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list) or not given or not all(map(_is_answer, given)):
        raise DataError(f"{place}: {key!r} is {value!r:.80}; expected a list of texts that are not blank")
    return given


def _list_aliases(row: Mapping[str, Any], key: str, place: str) -> list[Any]:
    """Return further answers, of which a row may have none; a text is one."""
    value = row.get(key) or []
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list):
        raise DataError(f"{place}: {key!r} is {value!r:.80}; expected a list of texts")
    return given


def _is_answer(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
