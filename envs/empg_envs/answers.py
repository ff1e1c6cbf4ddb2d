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
        if not isinstance(flag, bool) and type(flag).__name__ not in ("bool_", "bool"):
            raise GarbageError(f"{name} is {describe(flag)}; expected bool")
    if not isinstance(info, dict):
        raise GarbageError(f"info is {describe(info)}; expected dict")
    _check_metrics(info.get("metrics") or {})
    _check_known_answer(info.get("known_answer", ("", "")))
    return {
        "observation": observation,
        "reward": float(reward),
        "terminated": bool(terminated),
        "truncated": bool(truncated),
        "info": info,
    }


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


def encode_reply(reply: Reply) -> bytes:
    """Encode a reply as one line of compact JSON.

    Raises:
      GarbageError: the reply is not JSON-able (only ``info`` can be the cause), has half of a character, or
        is too long.
    """
    try:
        line = json.dumps(reply, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise GarbageError(f"info is not JSON-able: {error}") from error
    if b"\\ud" in line:  # halves of characters
        check_texts(reply)
    if len(line) > MAX_REPLY_BYTES:
        raise GarbageError(
            f"observation and info take {len(line)} bytes; at most {MAX_REPLY_BYTES} are allowed"
        )
    return line + b"\n"


def describe(value: Any) -> str:
    """Return the type and the beginning of a value, for a message."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
