"""What crosses between an environment and its worker, looked at piece by piece."""

from __future__ import annotations

import json
from typing import Any

from empg_envs.answers import GarbageError, check_answer, encode_reply


def check_opening(result: Any) -> None:
    """Check what ``reset`` returned."""
    require(isinstance(result, tuple) and len(result) == 2, f"reset returned {result!r:.200}")
    observation, info = result
    _check_crossing(observation, 0.0, False, False, info)
    require(observation, "the first observation is empty")
    check_info(info)
    require(isinstance(info.get("task"), str) and info["task"], 'the info of reset has no text "task"')


def check_reply(result: Any) -> None:
    """Check what ``step`` returned."""
    require(isinstance(result, tuple) and len(result) == 5, f"step returned {result!r:.200}")
    _check_crossing(*result)
    _, reward, terminated, truncated, info = result
    require(type(reward) in (float, int), f"the reward is {reward!r} ({type(reward).__name__}), no number")
    require(type(terminated) is bool, f"terminated is {terminated!r} ({type(terminated).__name__})")
    require(type(truncated) is bool, f"truncated is {truncated!r} ({type(truncated).__name__})")
    check_info(info)


def check_info(info: dict[str, Any]) -> None:
    """Check an info: JSON values only, a verdict, sorted commands, metrics that are numbers."""
    require(is_json(info), f"the info is no object of JSON values: {info!r:.300}")
    require(isinstance(info.get("won"), bool), f'info["won"] is {info.get("won")!r}; expected true or false')
    admissible = info.get("admissible", [])
    require(admissible == sorted(set(admissible)), 'info["admissible"] is not sorted, or repeats a command')
    metrics = info.get("metrics", {})
    bad = {name: value for name, value in metrics.items() if not isinstance(value, float)}
    require(not bad, f'info["metrics"] has values that are no float: {bad}')


def _check_crossing(*answer: Any) -> None:
    """Check an answer, in five parts, as a worker does before it sends one."""
    try:
        encode_reply(check_answer(*answer))
    except GarbageError as error:
        raise AssertionError(str(error)) from None


def require(condition: Any, message: str) -> None:
    """Raise an AssertionError with the message unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def is_json(value: Any) -> bool:
    """Return whether a value stays the same as JSON."""
    try:
        return json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError):
        return False
