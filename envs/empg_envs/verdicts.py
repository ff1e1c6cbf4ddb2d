"""What a program or a function says of an episode: its reward, whether it succeeded, and metrics."""

from __future__ import annotations

import contextlib
import math
from typing import Any


def read_verdict(found: Any) -> dict[str, Any]:
    """Read a number, or an object with ``reward`` and maybe ``success`` and ``metrics``.

    Returns:
      All three, where ``success`` is by default a positive reward.

    Raises:
      ValueError: the message says which of them is missing: a finite reward, a success that is true or
        false, or finite numbers as metrics.
    """
    given = found if isinstance(found, dict) else {"reward": found}
    reward: Any = given.get("reward")
    if isinstance(reward, bool) or not _is_finite(reward):
        raise ValueError("no finite reward")
    success, metrics = given.get("success"), given.get("metrics")
    if success is not None and success not in (True, False):
        raise ValueError("no true or false as success")
    if metrics is not None and not isinstance(metrics, dict):
        raise ValueError("no object as metrics")
    numbers = metrics or {}
    wrong = next((name for name, value in numbers.items() if not _is_finite(value)), None)
    if wrong is not None:
        raise ValueError(f"no finite number as metrics.{wrong}")
    return {
        "reward": float(reward),
        "success": reward > 0 if success is None else bool(success),
        "metrics": {str(name): float(value) for name, value in numbers.items()},
    }


def _is_finite(value: Any) -> bool:
    with contextlib.suppress(OverflowError):  # an integer may be larger than any float
        return isinstance(value, int | float) and math.isfinite(value)
    return False
