"""Losses by the names of the wire: those of the official API, and every algorithm of this project.

``cross_entropy``, ``importance_sampling``, ``ppo`` and ``cispo`` take weights or advantages from the client
and sum over tokens. ``empg:NAME`` is an algorithm of `ALGORITHMS`: the client sends turns, rewards and
groups, and credit is computed here, over all datums of the request.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from empg_jax.algorithms import ALGORITHMS, Algorithm, Recipe, build, make_recipe, parts
from empg_jax.algorithms.aggregation import SCALED_MODES
from empg_jax.algorithms.configure import configure
from empg_jax.algorithms.keys import readers
from empg_jax.algorithms.part import name_of
from empg_jax.algorithms.recipe import needs_of
from empg_jax.algorithms.signatures import FACTORIES
from empg_jax.config.algorithm import check_values
from empg_jax.errors import nearest
from empg_jax.serve.wire import is_number, refuse

OURS = "empg:"
FACTS = ("success", "milestones")  # inputs of ours without which some algorithms have no credit of steps
_CONFIG = "loss_fn_config"
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}  # bounds of the ratio itself


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss that can be trained.

    Attributes:
      name: its name on the wire.
      settings: what identifies it together with the name.
      algorithm: its functions.
      has_credit: whether advantages are computed here.
      needs_reference: whether a frozen reference must be scored.
      weights: the input that weighs the tokens, where the client sends it.
      facts: further inputs that its credit is made of: ``success``, ``milestones``.
    """

    name: str
    settings: tuple[tuple[str, Any], ...]
    algorithm: Algorithm
    has_credit: bool
    needs_reference: bool = False
    weights: str = "advantages"
    facts: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        """What a compiled program may be reused for."""
        return self.name, self.settings


def find_objective(
    name: str, config: Mapping[str, float | str], *, max_tokens: int | None = None
) -> Objective:
    """Find a loss by its name.

    Args:
      name: of the wire.
      config: its settings, numbers and texts.
      max_tokens: the longest datum, which a constant divisor of the loss (Dr. GRPO) is by default.

    Raises:
      ApiError: there is no such loss or setting, or the server cannot train it.
    """
    for key, value in config.items():
        if not isinstance(value, str) and not is_number(value):
            raise refuse(f"loss_fn_config: {key}={value!r:.80} must be a finite number", "loss_fn_config")
    if name.startswith(OURS):
        return _find_ours(name.removeprefix(OURS), config, max_tokens)
    if name not in _NATIVE:
        known = [*_NATIVE, OURS + "NAME"]
        hint = nearest(name, [*_NATIVE, *(OURS + key for key in ALGORITHMS)])
        raise refuse(f"loss_fn={name!r} is not known{hint}; there are {', '.join(known)}", "loss_fn")
    defaults, make = _NATIVE[name]
    for key, value in config.items():
        if key not in defaults:
            raise refuse(f"loss_fn_config: {name} has no {key}{nearest(key, defaults)}", "loss_fn_config")
        if isinstance(value, str):
            raise refuse(f"loss_fn_config: {key}={value!r} must be a number", "loss_fn_config")
    settings = {**defaults, **config}
    # The estimate is a place holder: the client sends the advantages.
    recipe = Recipe(estimate=parts.reinforce(), objective=make(**settings))
    weights = "weights" if name == "cross_entropy" else "advantages"
    return Objective(name, tuple(sorted(settings.items())), build(recipe), False, weights=weights)


def _clipped(part: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    def make(clip_low_threshold: float, clip_high_threshold: float) -> Any:
        return part(clip_low=1 - clip_low_threshold, clip_high=clip_high_threshold - 1, **fixed)

    return make


def _unclipped() -> Any:
    return parts.ppo_clip(clip_low=math.inf, clip_high=math.inf, dual_clip=None)


# Name -> settings with their defaults, and the objective from them.
_NATIVE: dict[str, tuple[dict[str, float], Callable[..., Any]]] = {
    # The weights of the examples stand in for advantages: loss = -weight * logprob.
    "cross_entropy": ({}, parts.reinforce_loss),
    "importance_sampling": ({}, _unclipped),
    "ppo": (_CLIP, _clipped(parts.ppo_clip, dual_clip=None)),
    "cispo": (_CLIP, _clipped(parts.cispo)),
}


def _find_ours(name: str, config: Mapping[str, float | str], max_tokens: int | None) -> Objective:
    if name not in ALGORITHMS:
        raise refuse(f"loss_fn={OURS + name!r} is not known{nearest(name, ALGORITHMS)}", "loss_fn")
    try:
        values = {key: _value_of(key, value) for key, value in config.items()}
        recipe = make_recipe(name, values)
        if name_of(recipe.aggregate) in SCALED_MODES and values.get("loss_scale") is None and max_tokens:
            recipe = configure(recipe, {"loss_scale": max_tokens})  # rows are as long as the request needs
        own = {key: value for key, value in values.items() if key != "invalid_penalty"}  # not of this section
        check_values(name, own)
    except (ValueError, TypeError) as error:
        raise refuse(f"loss_fn_config: {error}", "loss_fn_config") from None
    if recipe.critic is not None:
        raise refuse(f"loss_fn={OURS + name!r} needs a critic, which this server does not train", "loss_fn")
    if recipe.needs_answers:
        raise refuse(f"loss_fn={OURS + name!r} needs scored answers, which no request has", "loss_fn")
    _refuse_idle(recipe, values)
    settings = tuple(sorted(values.items(), key=lambda item: item[0]))
    facts = tuple(fact for fact in FACTS if fact in needs_of(recipe.estimate))
    return Objective(OURS + name, settings, build(recipe), True, recipe.needs_reference, facts=facts)


def _refuse_idle(recipe: Recipe, values: Mapping[str, Any]) -> None:
    """Refuse what would silently do nothing, for want of what no request tells."""
    for key in ("mask_truncated", "anchor_similarity"):
        if values.get(key) not in (None, "none", 1.0):
            raise refuse(f"loss_fn_config: {key} has no effect here: no request tells what it reads", _CONFIG)
    parts_of = {name_of(part): part for part in (*recipe.correct, recipe.objective)}  # type: ignore[misc]
    compared: list[str] = [name for name in ("tis", "mis", "decoupled_ppo") if name in parts_of]
    options = getattr(parts_of.get("sequence_mask"), "options", {})
    compared += ["correction.sequence_logprobs=learner"] if options.get("logprobs_of") == "learner" else []
    if compared:
        raise refuse(
            f"loss_fn_config: {compared[0]} compares learner and sampler, but the log-probs of a request are "
            "taken for both",
            _CONFIG,
        )


def _value_of(key: str, value: float | str) -> Any:
    """Read a setting: the wire has numbers and texts only, keys have integers, flags and nulls, too."""
    if isinstance(value, str):
        return json.loads(value) if value in ("true", "false", "null") else value
    kinds = [FACTORIES[slot][factory][option].annotation for slot, factory, option in readers(key)]
    if any("bool" in kind for kind in kinds):
        return bool(value)
    is_count = float(value).is_integer() and any("Count" in kind or "int" in kind for kind in kinds)
    return int(value) if is_count else float(value)
