"""The recipes of the papers by name. A new recipe is one line here; the configuration then knows its name."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from empg_jax.algorithms import parts
from empg_jax.algorithms.compose import Algorithm, build
from empg_jax.algorithms.configure import configure
from empg_jax.algorithms.keys import flatten
from empg_jax.algorithms.masking import check_choice
from empg_jax.algorithms.part import name_of
from empg_jax.algorithms.recipe import Recipe

# `empg_jax.algorithms.signatures` reads this table as text, so it holds calls with literal values only.
RECIPES: dict[str, Recipe] = {
    "reinforce": Recipe(
        estimate=parts.reinforce(), objective=parts.reinforce_loss(), aggregate="seq-mean-token-sum"
    ),
    "rloo": Recipe(estimate=parts.rloo()),
    "grpo": Recipe(estimate=parts.grpo()),
    "dr_grpo": Recipe(estimate=parts.grpo(scale_by_std=False), aggregate="seq-mean-token-const"),
    "grpo_turn_rows": Recipe(estimate=parts.grpo_turn_rows()),
    "dapo": Recipe(estimate=parts.grpo(), objective=parts.ppo_clip(clip_low=0.2, clip_high=0.28)),
    "gspo": Recipe(estimate=parts.grpo(), objective=parts.gspo(), aggregate="seq-mean-token-mean"),
    "cispo": Recipe(estimate=parts.grpo(), objective=parts.cispo()),
    "sapo": Recipe(estimate=parts.grpo(), objective=parts.sapo(), aggregate="seq-mean-token-mean"),
    "gigpo": Recipe(estimate=parts.gigpo()),
    "reinforce_pp": Recipe(estimate=parts.reinforce_pp(reward_kl_coef=0.001)),
    "reinforce_pp_baseline": Recipe(estimate=parts.reinforce_pp(group_baseline=True)),
    "ppo": Recipe(estimate=parts.ppo(), critic=parts.critic()),
    "hgpo": Recipe(estimate=parts.hgpo()),
    "crbc": Recipe(estimate=parts.crbc()),
    "graph_hca": Recipe(estimate=parts.graph_hca()),
    "graft": Recipe(estimate=parts.graft(), objective=parts.turn_ratio_clip()),
    "graph_gpo": Recipe(estimate=parts.graph_gpo()),
    "gagpo": Recipe(estimate=parts.gagpo(), objective=parts.turn_ratio_clip()),
    "turn_ppo": Recipe(estimate=parts.turn_ppo(), objective=parts.turn_ratio_clip(), critic=parts.critic()),
    "beacon": Recipe(estimate=parts.beacon()),
    "igpo": Recipe(estimate=parts.igpo()),
    "a2tgpo": Recipe(estimate=parts.a2tgpo(), objective=parts.turn_ratio_clip()),
    "erc": Recipe(
        estimate=parts.grpo(),
        objective=parts.ppo_clip(clip_low=0.2, clip_high=0.28, dual_clip=10.0),
        correct=parts.entropy_ratio(low=0.95, high=1.05),
    ),
    "sampo": Recipe(
        estimate=parts.gigpo(),
        objective=parts.gspo(clip_low=3e-3, clip_high=4e-3, unit="turn"),
        keep=parts.drop_uniform(unit="group"),
    ),
}

# Every recipe also with each modulation: grpo, grpo_empg, grpo_aem, ...
ALGORITHMS: dict[str, Recipe] = RECIPES | {
    f"{name}_{part.name}": dataclasses.replace(recipe, modulate=part)
    for name, recipe in RECIPES.items()
    for part in (parts.empg(), parts.aem())
}


def make_recipe(
    name: str | Recipe = "grpo", values: Mapping[str, Any] | None = None, *, group_size: int | None = None
) -> Recipe:
    """Compose a recipe from a name (or a recipe of your own) and the keys of a configuration.

    Args:
      name: a key of `ALGORITHMS`, or a recipe.
      values: keys that differ, as a configuration spells them below ``algorithm``: ``clip_high``,
        ``empg.zeta``, or nested tables of them; and ``invalid_penalty``.
      group_size: attempts of each task, if known; with 1, AEM's scope ``group`` becomes ``batch``, and warns.

    Raises:
      ValueError: for an unknown name or key, a bad choice, a key that no chosen part reads, two modulations.
    """
    given = flatten(values or {})
    if isinstance(name, Recipe):
        recipe = name
    else:
        check_choice("algorithm name", name, tuple(ALGORITHMS))
        recipe = ALGORITHMS[name]
        chosen = given.get("modulation")
        if recipe.modulate is not None:
            if chosen not in (None, name_of(recipe.modulate)):
                raise ValueError(
                    f"one modulation only: {name!r} means {name_of(recipe.modulate)!r}, and modulation is "
                    f"{chosen!r}"
                )
            given = {key: value for key, value in given.items() if key != "modulation"}
    recipe = configure(recipe, given)
    single = for_single_attempts(recipe) if group_size == 1 else recipe
    if single is not recipe:
        warnings.warn('group_size=1: AEM\'s scope="group" falls back to scope="batch"', stacklevel=3)
    return single


def for_single_attempts(recipe: Recipe) -> Recipe:
    """Exchange AEM's scope ``group`` for ``batch``: with one attempt per task a group says nothing."""
    options = getattr(recipe.modulate, "options", {})
    if name_of(recipe.modulate) != "aem" or options.get("scope") != "group":
        return recipe
    return configure(recipe, {"aem.scope": "batch"})


def make_algorithm(
    name: str | Recipe = "grpo",
    *,
    num_minibatches: int = 1,
    group_size: int | None = None,
    **values: Any,
) -> Algorithm:
    """Build an algorithm by name.

    Args:
      name: a key of `ALGORITHMS`, or a `Recipe` of your own.
      num_minibatches: optimizer steps that each batch is split into.
      group_size: attempts of each task, if known.
      **values: keys that differ from the recipe's, as in `make_recipe`: ``modulation="aem"``,
        ``clip_high=0.28``, ``empg={"zeta": 0.05}``.

    Returns:
      The pure functions.

    Raises:
      ValueError: as `make_recipe`; and for fewer than one mini-batch.
    """
    return build(make_recipe(name, values, group_size=group_size), num_minibatches=num_minibatches)
