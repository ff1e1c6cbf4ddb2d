"""Defaults of training on what others sampled: older weights, stored episodes, or another program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from empg_jax.config.algorithm import AlgorithmConfig

SERVER = "rollout.engine=openai"


def find_lag(values: Mapping[str, Any]) -> str | None:
    """Return the key, with its value, that makes samples differ from the policy's; None: none does."""
    train, rollout = (values.get(section) for section in ("train", "rollout"))
    lag = train.get("max_lag") if isinstance(train, Mapping) else None
    if isinstance(lag, int) and lag > 0:
        return f"train.max_lag={lag}"
    if not isinstance(rollout, Mapping):
        return None
    if (stored := rollout.get("stored")) is not None:
        return f"rollout.stored={stored}"
    return SERVER if rollout.get("engine") == "openai" else None


def tell_lag(lag: str) -> str:
    """Say what such a key means."""
    return f"{lag} trains on samples of {'another program' if lag == SERVER else 'other weights'}"


def with_lag_defaults(
    values: dict[str, Any],
    check: Callable[[dict[str, Any]], AlgorithmConfig],
    *,
    lag: str,
    is_entropy_source_given: bool,
) -> tuple[dict[str, Any], list[str]]:
    """Correct for the sampler's age, unless the user decided otherwise.

    Without a correction of its own, the algorithm gets truncated importance sampling. Entropies come from the
    learner's score pass: those of the sampler belong to older weights, or there are none.

    Args:
      values: the file with the command's overrides, as read; they set a lag.
      check: checks values and makes the ``algorithm`` section; it raises where they cannot be used.
      lag: the key that sets it, with its value.
      is_entropy_source_given: the user set ``algorithm.entropy_source`` for this lag, so it is not changed.

    Returns:
      The values with these defaults, and a note on each.
    """
    algorithm, notes = dict(values.get("algorithm") or {}), []
    why = tell_lag(lag)
    if algorithm.get("entropy_source") == "engine":
        if is_entropy_source_given:
            return values, []  # a contradiction, which the check of the configuration reports
        algorithm["entropy_source"] = "learner"
        notes.append(f"algorithm.entropy_source=learner, because {why}")
    # The name or a custom recipe may bring a correction: only the checked configuration tells.
    checked = check({**values, "algorithm": algorithm})
    correction = dict(algorithm.get("correction") or {})
    if "kind" not in correction and not _is_corrected(checked):
        algorithm["correction"] = correction | {"kind": "tis"}
        notes.append(f"algorithm.correction.kind=tis, because {why}")
    return {**values, "algorithm": algorithm}, notes


def lag_notes(lag: str | None, algorithm: AlgorithmConfig) -> Iterator[str]:
    """Yield a note when such samples are trained on without a correction, which is allowed."""
    if lag is not None and not _is_corrected(algorithm):
        yield (
            f"{tell_lag(lag)} without a correction: "
            "algorithm.correction.kind=tis (or mis), or algorithm.loss=decoupled_ppo corrects for that"
        )


def _is_corrected(algorithm: AlgorithmConfig) -> bool:
    return algorithm.correction.kind != "none" or algorithm.loss == "decoupled_ppo"
