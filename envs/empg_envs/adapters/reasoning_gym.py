"""Reasoning Gym: generated questions with a scorer, one turn each."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from empg_envs.adapters.foreign import ForeignEnv, Reply, hash_of, import_package, make_sizes
from empg_envs.names import suggest

# Of 8 parts of all questions (by hash) one is valid, one is test, and the others are train.
NOT_A_NUMBER = re.compile(r"\bnan[ij]?\b", re.IGNORECASE)
# Scorers that compute with an answer take it for Python: what calls anything but these is a program.
EVALUATES = re.compile(r"\b(eval|parse_expr)\(")
FUNCTIONS = frozenset(("Abs", "Rational", "abs", "cot", "csc", "exp", "ln", "log", "sec", "sqrt")) | {
    f"{arc}{name}{end}" for arc in ("", "a") for name in ("cos", "sin", "tan") for end in ("", "h")
}
CALLED = re.compile(r"([^\W\d]\w*)\s*\(")
TRICKS = re.compile(r"""__|[])}"']\s*\(|\#|\\\s""")
PARTS = {"valid": (0,), "test": (1,), "train": (2, 3, 4, 5, 6, 7)}
TRIES = {"valid": 64, "test": 64, "train": 16}  # seeds of a task that are looked at for a fitting question


class ReasoningGymEnv(ForeignEnv):
    """Questions of Reasoning Gym, one turn each, scored by the package itself.

    Splits have different seeds and different questions: a question's hash decides its split.

    Args:
      dataset: one name, or several; an entry of several may be ``{name, weight, params, level}``.
      params: parameters of the dataset, if there is one, for example ``{max_terms: 2}``.
      level: level of the dataset's own curriculum: everything up to that difficulty. ``params`` go first.
      tasks: number of training questions.
      held_out: number of questions of ``valid`` and of ``test``.

    Raises:
      ValueError: the package, a dataset or its curriculum does not exist, or it refuses its parameters.
    """

    def __init__(
        self,
        dataset: str | Sequence[str | Mapping[str, Any]] = "chain_sum",
        *,
        params: Mapping[str, Any] | None = None,
        level: int | None = None,
        tasks: int = 1024,
        held_out: int = 128,
    ) -> None:
        super().__init__("reasoning_gym", make_sizes(tasks, held_out), max_turns=1)
        import_package("reasoning_gym", "reasoning-gym")
        single = isinstance(dataset, str)
        entries = [{"name": dataset, "params": params, "level": level}] if single else dataset
        self._entries = [_read_entry(entry, level) for entry in entries]
        self._data: dict[str, Any] = {}
        self._split, self._entry = "train", self._find("train", 0)

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """Return the question with its answer."""
        entry = self._find(split, index)
        question, name = entry["question"], _source_of(entry)
        task = {"split": split, "index": index, "dataset": name, "question": question}
        return {**task, "answer": str(entry["answer"]), "content_hash": hash_of(name, question)}

    def expert_action(self) -> str:
        """Return the package's own answer."""
        if self._entry["answer"] is None:
            raise RuntimeError(f"{_source_of(self._entry)} has questions without an answer of its own")
        return str(self._entry["answer"])

    def _begin(self, split: str, index: int) -> tuple[str, dict[str, Any]]:
        self._split, self._entry = split, self._find(split, index)
        return self._entry["question"], self._info(False)

    def _act(self, action: str) -> Reply:
        error, answer = 0.0, str(self._entry["answer"])
        try:
            if is_program(action, answer) and _evaluates(_source_of(self._entry)):
                raise ValueError("the answer is a program")
            score = float(self._data[self._split].score_answer(action.strip(), self._entry))
        except Exception:  # some scorers evaluate the answer, which may be any text
            score, error = 0.0, 1.0
        # Differences from "nan" are no numbers, and some scorers take those for perfect.
        is_trick = NOT_A_NUMBER.search(action) and not NOT_A_NUMBER.search(answer)
        if is_trick or not math.isfinite(score):
            score, error = 0.0, 1.0
        info = {**self._info(score >= 1.0), "metrics": {"score": score, "scorer_error": error}}
        return "", score, True, False, info

    def _info(self, won: bool) -> dict[str, Any]:
        name = _source_of(self._entry)
        return {"task": f"answer the question ({name})", "group": name, "won": won}

    def _find(self, split: str, index: int) -> dict[str, Any]:
        """Return the first question of a task's seeds whose hash belongs to the split."""
        count, tries = self.num_tasks(split), TRIES[split]
        self._seed_of(split, index)  # refuses an index that does not exist
        if split not in self._data:
            self._data[split] = _make_data(self._entries, self._seed_of(split, 0), count * tries)
        data = self._data[split]
        # The last resort is a question that another task has, too.
        for number in itertools.chain(range(index, count * tries, count), range(count * tries)):
            entry = data[number]
            if int(hash_of(_source_of(entry), entry["question"])[:8], 16) % 8 in PARTS[split]:
                return entry
        raise ValueError(
            f"reasoning_gym has no question for {split}/{index}: the dataset has too few different ones "
            "with these parameters to hold some out"
        )


def is_program(action: str, answer: str) -> bool:
    """Return whether an answer, read as Python, may do more than compute: a scorer could be changed by it.

    Args:
      action: what the policy answers.
      answer: the package's own answer; functions that it calls are known, too.
    """
    known = FUNCTIONS | set(CALLED.findall(answer))
    return bool(TRICKS.search(action)) or not known.issuperset(CALLED.findall(action))


@functools.cache
def _evaluates(name: str) -> bool:
    """Return whether the module of a dataset evaluates text, maybe the answers."""
    datasets = importlib.import_module("reasoning_gym.factory").DATASETS
    if name not in datasets:
        return True
    return bool(EVALUATES.search(inspect.getsource(importlib.import_module(datasets[name][0].__module__))))


def _source_of(entry: Mapping[str, Any]) -> str:
    return str(entry["metadata"].get("source_dataset", "dataset"))


def _read_entry(entry: Any, level: int | None) -> dict[str, Any]:
    """Return name, weight and complete parameters of a dataset."""
    factory = importlib.import_module("reasoning_gym.factory")
    entry = {"name": entry} if isinstance(entry, str) else dict(entry)
    known = ("name", "weight", "params", "level")
    if unknown := [key for key in entry if key not in known]:
        raise ValueError(
            f"dataset entry {entry}: unknown key {unknown[0]!r}; its keys are {', '.join(known)}"
        )
    name = entry.get("name")
    if name not in factory.DATASETS:
        raise ValueError(f"reasoning_gym has no dataset {name!r}{suggest(name, factory.DATASETS)}")
    level = entry.get("level", level)
    params = dict(entry.get("params") or {})
    if level is not None:
        if name not in factory.CURRICULA:
            raise ValueError(f"dataset {name} has no curriculum, so it takes params, no level")
        if type(level) is not int or level < 0:
            raise ValueError(f"level={level!r} of dataset {name}: expected a number from 0")
        curriculum = factory.create_curriculum(name)
        curriculum.set_global_level(level)
        made = curriculum.generate_configuration()
        params = {**{field.name: getattr(made, field.name) for field in dataclasses.fields(made)}, **params}
    params = {key: value for key, value in params.items() if key not in ("seed", "size")}
    return {"name": name, "weight": float(entry.get("weight", 1.0)), "params": params}


def _make_data(entries: Sequence[Mapping[str, Any]], seed: int, size: int) -> Any:
    """Make one dataset, or the package's composite of several."""
    factory = importlib.import_module("reasoning_gym.factory")
    extent = {"seed": seed, "size": size}
    try:
        if len(entries) == 1:
            return factory.create_dataset(entries[0]["name"], **entries[0]["params"], **extent)
        spec = importlib.import_module("reasoning_gym.composite").DatasetSpec
        parts = [spec(name=each["name"], weight=each["weight"], config=each["params"]) for each in entries]
        return factory.create_dataset("composite", datasets=parts, **extent)
    except (AssertionError, TypeError, ValueError) as error:
        names = ", ".join(each["name"] for each in entries)
        raise ValueError(f"reasoning_gym cannot make {names}: {error}") from None
