"""The recipes of the papers by name. Adding one is a function and a line."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from empg_jax.algorithms.advantages import grpo, rloo
from empg_jax.algorithms.compose import MODULATIONS, AemSettings, Algorithm, EmpgSettings, Recipe, build
from empg_jax.algorithms.masking import check_choice
from empg_jax.types import Batch


def grpo_turns(batch: Batch, turn_mask: Bool[Array, "N K"], recipe: Recipe) -> Float[Array, "N K"]:
    """`grpo` on episode returns, the same for every turn."""
    advantages = grpo(
        batch.returns, batch.group_ids, scale_by_std=recipe.scale_by_std, singleton=recipe.singleton
    )
    return jnp.broadcast_to(advantages[:, None], turn_mask.shape)


def rloo_turns(batch: Batch, turn_mask: Bool[Array, "N K"], recipe: Recipe) -> Float[Array, "N K"]:
    """`rloo` on episode returns, the same for every turn."""
    advantages = rloo(batch.returns, batch.group_ids, singleton=recipe.singleton)
    return jnp.broadcast_to(advantages[:, None], turn_mask.shape)


def _with_modulations(name: str, recipe: Recipe) -> dict[str, Recipe]:
    """A base recipe and its two modulated forms."""
    modulated = {f"{name}_{kind}": dataclasses.replace(recipe, modulation=kind) for kind in ("empg", "aem")}
    return {name: recipe} | modulated


ALGORITHMS: dict[str, Recipe] = {
    **_with_modulations("grpo", Recipe(estimator=grpo_turns)),
    **_with_modulations(
        "dr_grpo",
        Recipe(estimator=grpo_turns, scale_by_std=False, loss_aggregation="seq-mean-token-sum-norm"),
    ),
    **_with_modulations("rloo", Recipe(estimator=rloo_turns)),
}


def _settings(kind: type, key: str, values: Any) -> Any:
    """Keywords of a modulation, from a mapping or an already built settings object."""
    if isinstance(values, kind):
        return values
    known = [field.name for field in dataclasses.fields(kind)]
    for name in values:
        check_choice(f"an option of {key}", name, known)
    return kind(**values)


def make_algorithm(
    name: str = "grpo", *, modulation: str = "none", num_minibatches: int = 1, **overrides: Any
) -> Algorithm:
    """Builds an algorithm by name.

    Args:
      name: a key of `ALGORITHMS`.
      modulation: ``empg`` or ``aem`` on top of a recipe without one; ``none`` leaves the recipe as it is.
      num_minibatches: optimizer steps that each batch is split into.
      **overrides: fields of `Recipe` that differ from the named one; ``empg`` and ``aem`` may be mappings of
        the keywords that differ from that modulation's defaults.

    Returns:
      The pair of pure functions.

    Raises:
      ValueError: for an unknown name, option or choice, and for two modulations.
    """
    check_choice("name", name, tuple(ALGORITHMS))
    check_choice("modulation", modulation, MODULATIONS)
    recipe = ALGORITHMS[name]
    if "none" not in (modulation, recipe.modulation) and modulation != recipe.modulation:
        raise ValueError(
            f"one modulation only: {name!r} already means modulation={recipe.modulation!r}, got {modulation!r} too"
        )
    known = [field.name for field in dataclasses.fields(Recipe)]
    for option in overrides:
        if option not in known:
            near = difflib.get_close_matches(option, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ValueError(f"unknown algorithm option {option!r}{hint}")
    for key, kind in (("empg", EmpgSettings), ("aem", AemSettings)):
        if isinstance(overrides.get(key), Mapping):
            overrides[key] = _settings(kind, key, overrides[key])
    if modulation != "none":
        overrides["modulation"] = modulation
    return build(dataclasses.replace(recipe, **overrides), num_minibatches=num_minibatches)
