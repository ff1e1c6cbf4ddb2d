"""What an answer of an environment must look like, before it leaves the environment's worker."""

from __future__ import annotations

import json
import math
import numbers
from typing import Any

Reply = dict[str, Any]
MAX_REPLY_BYTES = 8 << 20  # longer replies are refused, because they could fill the parent's memory


class GarbageError(Exception):
    """A result of an environment that violates the protocol."""


def check_answer(observation: Any, reward: Any, terminated: Any, truncated: Any, info: Any) -> Reply:
    """Convert the result of ``reset`` or ``step`` to a reply.

    Raises:
      GarbageError: a part has the wrong type; the message names the first one.
    """
    if not isinstance(observation, str):
        raise GarbageError(f"observation is {describe(observation)}; expected str")
    if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
        raise GarbageError(f"reward is {describe(reward)}; expected a finite number")
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        _check_flag(name, flag)
    if not isinstance(info, dict):
        raise GarbageError(f"info is {describe(info)}; expected dict")
    for name in ("won", "milestone"):
        _check_flag(f"info['{name}']", info.get(name, False))
    _check_metrics(info.get("metrics") or {})
    _check_known_answer(info.get("known_answer", ("", "")))
    return {
        "observation": observation,
        "reward": float(reward),
        "terminated": bool(terminated),
        "truncated": bool(truncated),
        "info": info,
    }


def _check_flag(name: str, flag: Any) -> None:
    """Check that a value is true or false; NumPy's are taken, too.

    Raises:
      GarbageError: it is something else.
    """
    if not isinstance(flag, bool) and not (_is_numpy_scalar(flag) and isinstance(flag.item(), bool)):
        raise GarbageError(f"{name} is {describe(flag)}; expected bool")


def _check_metrics(metrics: Any) -> None:
    """Check ``info["metrics"]``, which is averaged and logged.

    Raises:
      GarbageError: it is no dict of finite numbers.
    """
    if not isinstance(metrics, dict):
        raise GarbageError(f"info['metrics'] is {describe(metrics)}; expected a dict of numbers")
    for name, value in metrics.items():
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise GarbageError(f"info['metrics'][{name!r}] is {describe(value)}; expected a finite number")


def _check_known_answer(answer: Any) -> None:
    """Check ``info["known_answer"]``: the words that lead to an answer in a response, and the answer.

    Raises:
      GarbageError: it is something else.
    """
    is_pair = isinstance(answer, (list, tuple)) and len(answer) == 2
    if not is_pair or not all(isinstance(text, str) for text in answer):
        raise GarbageError(f"info['known_answer'] is {describe(answer)}; expected two texts")


def check_texts(reply: Reply) -> None:
    """Check that no text of a reply has half of a character: no tokenizer and no file takes one.

    Raises:
      GarbageError: one has; the message names the part and the character.
    """
    for name in ("observation", "info"):
        try:
            # By way of JSON, which joins two halves that belong together.
            json.dumps(json.loads(json.dumps(reply.get(name))), ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            lone = ascii(error.object[error.start])
            raise GarbageError(
                f"{name} has the character {lone}, which is half of one; expected Unicode text"
            ) from None


def plain_number(value: Any) -> Any:
    """Return what JSON has in place of NumPy's scalar; for ``default`` of ``json.dumps``.

    Raises:
      TypeError: it is no such scalar.
    """
    if not _is_numpy_scalar(value):
        raise TypeError(f"a value is {describe(value)}")
    return value.item()


def _is_numpy_scalar(value: Any) -> bool:
    # By name: NumPy is loaded only where an environment does so.
    return any(f"{base.__module__}.{base.__name__}" == "numpy.generic" for base in type(value).__mro__)


def encode_reply(reply: Reply) -> bytes:
    """Encode a reply as one line of compact JSON; NumPy's scalars become plain numbers and booleans.

    Raises:
      GarbageError: the reply is not JSON-able (only ``info`` can be the cause), has half of a character, or
        is too long.
    """
    try:
        line = json.dumps(reply, separators=(",", ":"), allow_nan=False, default=plain_number).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise GarbageError(f"info is not JSON-able: {_find_odd(reply.get('info')) or error}") from error
    if b"\\ud" in line:  # halves of characters
        check_texts(reply)
    if len(line) > MAX_REPLY_BYTES:
        raise GarbageError(
            f"observation and info take {len(line)} bytes; at most {MAX_REPLY_BYTES} are allowed"
        )
    return line + b"\n"


def _find_odd(value: Any, place: str = "info") -> str:
    """Return place, type and beginning of the first value that JSON does not have; empty without one."""
    if isinstance(value, dict):
        for key in value:
            if key is not None and not isinstance(key, (str, int, float)):
                return f"{place} has the key {describe(key)}; expected str"
    if isinstance(value, (dict, list, tuple)):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        try:
            return next(filter(None, (_find_odd(part, f"{place}[{key!r}]") for key, part in parts)), "")
        except RecursionError:  # a value that holds itself
            return ""
    try:
        json.dumps(value, allow_nan=False, default=plain_number)
    except (TypeError, ValueError):
        return f"{place} is {describe(value)}"
    return ""


def describe(value: Any) -> str:
    """Return the type, with its module, and the beginning of a value, for a message."""
    text, kind = repr(value), type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"{name} {text if len(text) <= 80 else text[:77] + '...'}"
