"""The fields of an episode record, and the check of a record that was read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from empg_jax.errors import UserError

Record = dict[str, Any]

NUMBER = (int, float)
LARGEST = float(np.finfo(np.float32).max)
# Field -> its JSON type, and the name of that type in messages. All fields are optional except those in
# NEEDED.
EPISODE_FIELDS: dict[str, tuple[Any, str]] = {
    "update": (int, "an integer"),
    "group_id": (int, "an integer"),
    "member": (int, "an integer"),
    "task": (int, "an integer"),
    "split": (str, "a string"),
    "group": (str, "a string"),
    "status": (str, "a string"),
    "reason": (str, "a string"),
    "detail": (str, "a string"),
    "return": (NUMBER, "a number"),
    "success": (bool, "true or false"),
    "terminated": (bool, "true or false"),
    "truncated": (bool, "true or false"),
    "metrics": (dict, "an object"),
    "last_observation": (str, "a string"),
    "last_anchor": (str, "a string"),
    "turns": (list, "a list of turns"),
}
TURN_FIELDS: dict[str, tuple[Any, str]] = {
    "observation": (str, "a string"),
    "response": (str, "a string"),
    "reward": (NUMBER, "a number"),
    "valid": (bool, "true or false"),
    "finish_reason": (str, "a string"),
    "version": (np.int32, "an integer of 32 bits"),
    "tokens": (int, "an integer"),
    "entropy": (NUMBER, "a number"),
    "logprob": (NUMBER, "a number"),
    "anchor": (str, "a string"),
    "action": (str, "a string"),
    "milestone": (bool, "true or false"),
    "answer_logprob": (NUMBER, "a number"),
    "token_ids": (list, "a list of integers of 32 bits"),
    "token_logprobs": (list, "a list of numbers"),
    "token_entropies": (list, "a list of numbers"),
}
MOST_TOKENS = 2**20  # of a turn: each has a place in a row of the batch
NEEDED = ("turns", "reward", "valid", "tokens")
# Null, or with null among them, where the sampler did not tell them.
UNKNOWN = ("entropy", "logprob", "answer_logprob", "token_logprobs", "token_entropies")


class RecordError(UserError):
    """A file of episode records cannot be used; the message names file, line and field."""


def check_episode(record: Any, where: str, *, needs_entropy: bool) -> None:
    """Check an episode's record; numbers that are null, because nobody knows them, are removed.

    Args:
      record: what the line holds.
      where: file and line, for messages.
      needs_entropy: refuse turns without an entropy.

    Raises:
      RecordError: a field is missing or of another type.
    """
    if not isinstance(record, dict):
        raise RecordError(f"{where}: expected one JSON object, an episode")
    _check_fields(record, EPISODE_FIELDS, where, "")
    if record.get("status", "trained") not in ("trained", "scored_zero"):
        raise RecordError(f"{where}, status: expected trained or scored_zero, got {record['status']!r}")
    if not record["turns"]:
        raise RecordError(f"{where}, turns: expected at least one turn")
    for k, turn in enumerate(record["turns"]):
        name = f"turns[{k}]"
        if not isinstance(turn, dict):
            raise RecordError(f"{where}, {name}: expected an object")
        for unknown in UNKNOWN:
            value = turn.get(unknown, ...)
            if value is None or (isinstance(value, list) and None in value):
                del turn[unknown]
        _check_fields(turn, TURN_FIELDS, where, f"{name}.")
        if needs_entropy and "entropy" not in turn:
            hint = "a modulation reads it (algorithm.modulation=none needs none)"
            raise RecordError(f"{where}, {name}.entropy: missing; expected a number: {hint}")
        if not 1 <= turn["tokens"] <= MOST_TOKENS:
            raise RecordError(f"{where}, {name}.tokens: expected 1 to {MOST_TOKENS}, got {turn['tokens']}")
        for array in ("token_ids", "token_logprobs", "token_entropies"):
            _check_array(turn, array, where, f"{name}.{array}")
    # A trajectory sums the rewards again, so a return that differs would be ignored silently.
    total = sum(turn["reward"] for turn in record["turns"])
    if not _is_of(total, NUMBER):
        raise RecordError(f"{where}, turns: the sum of their rewards is {total:.3g}, beyond float32 (3.4e38)")
    if abs(record.get("return", total) - total) > 1e-4 * max(1.0, abs(total)):
        raise RecordError(
            f"{where}, return: {record['return']:g} is not the sum of the turns' rewards, {total:g}"
        )


def _check_fields(fields: Record, known: Mapping[str, tuple[Any, str]], where: str, prefix: str) -> None:
    for name, (kind, words) in known.items():
        if name not in fields:
            if name in NEEDED:
                raise RecordError(f"{where}, {prefix}{name}: missing; expected {words}")
            continue
        if not _is_of(fields[name], kind):
            found = json.dumps(fields[name])[:60]
            if kind is NUMBER and _is_of(fields[name], float | int) and abs(fields[name]) > LARGEST:
                words += " within float32 (3.4e38)"
            raise RecordError(f"{where}, {prefix}{name}: expected {words}, got {found}")


def _check_array(turn: Record, name: str, where: str, field: str) -> None:
    if name not in turn:
        return
    values, kind = turn[name], np.int32 if name == "token_ids" else NUMBER
    if len(values) != turn["tokens"]:
        raise RecordError(f"{where}, {field}: {len(values)} values for {turn['tokens']} tokens")
    wrong = [value for value in values if not _is_of(value, kind)]
    if wrong:
        raise RecordError(
            f"{where}, {field}: expected {TURN_FIELDS[name][1]}, got {json.dumps(wrong[0])[:60]} among them"
        )


def _is_of(value: Any, kind: Any) -> bool:
    """Return whether a JSON value has a type; true and false are no numbers, and numbers fit float32."""
    if isinstance(value, bool) and kind is not bool:
        return False
    if kind is np.int32:
        return isinstance(value, int) and -(2**31) <= value < 2**31
    if not isinstance(value, kind):
        return False
    return kind is not NUMBER or (abs(value) <= LARGEST)
