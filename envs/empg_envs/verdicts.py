"""What a program or a function says of an episode: its reward, whether it succeeded, and metrics."""

from __future__ import annotations

import math
from typing import Any


def read_verdict(found: Any) -> dict[str, Any] | None:
    """Read a number, or an object with ``reward`` and maybe ``success`` and ``metrics``.

    Returns:
      All three, where ``success`` is by default a positive reward; None where there is no finite reward.
    """
    result = {"reward": found} if _is_number(found) else found
    if not isinstance(result, dict) or not _is_number(result.get("reward")):
        return None
    metrics = result.get("metrics") or {}
    return {
        "reward": float(result["reward"]),
        "success": bool(result.get("success", result["reward"] > 0)),
        "metrics": {str(name): float(value) for name, value in metrics.items()},
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
