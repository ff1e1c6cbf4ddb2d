"""The recipes of the papers by name. Adding one is a function and a line."""

import dataclasses
import difflib
import warnings
from collections.abc import Mapping
from typing import Any

from empg_jax.algorithms.compose import Algorithm, build
from empg_jax.algorithms.estimators import (
    gigpo_turns,
    grpo_row_turns,
    grpo_turns,
    ppo_tokens,
    ppo_value_targets,
    reinforce_pp_tokens,
    reinforce_turns,
    rloo_turns,
)
from empg_jax.algorithms.masking import check_choice
from empg_jax.algorithms.recipe import (
    MODULATIONS,
    AemSettings,
    Correction,
    CriticSettings,
    EmpgSettings,
    Recipe,
)

BASE_RECIPES: dict[str, Recipe] = {
    "reinforce": Recipe(
        estimator=reinforce_turns, loss="reinforce", loss_aggregation="seq-mean-token-sum", dual_clip=None
    ),
    "rloo": Recipe(estimator=rloo_turns),
    "grpo": Recipe(estimator=grpo_turns),
    "dr_grpo": Recipe(estimator=grpo_turns, scale_by_std=False, loss_aggregation="seq-mean-token-sum"),
    "grpo_turn_rows": Recipe(estimator=grpo_row_turns),
    "dapo": Recipe(estimator=grpo_turns, clip_low=0.2, clip_high=0.28),
    "gspo": Recipe(estimator=grpo_turns, loss="gspo", loss_aggregation="seq-mean-token-mean", dual_clip=None),
    "cispo": Recipe(estimator=grpo_turns, loss="cispo", dual_clip=None),
    "sapo": Recipe(estimator=grpo_turns, loss="sapo", loss_aggregation="seq-mean-token-mean", dual_clip=None),
    "gigpo": Recipe(estimator=gigpo_turns, scale_by_std=False),
    "reinforce_pp": Recipe(token_estimator=reinforce_pp_tokens, reward_kl_coef=0.001),
    "reinforce_pp_baseline": Recipe(token_estimator=reinforce_pp_tokens, group_baseline=True),
    "ppo": Recipe(token_estimator=ppo_tokens, value_targets=ppo_value_targets),
}

# Every base also with each modulation: grpo, grpo_empg, grpo_aem, ...
ALGORITHMS: dict[str, Recipe] = BASE_RECIPES | {
    f"{name}_{kind}": dataclasses.replace(recipe, modulation=kind)
    for name, recipe in BASE_RECIPES.items()
    for kind in ("empg", "aem")
}

_SECTIONS: dict[str, type] = {
    "empg": EmpgSettings,
    "aem": AemSettings,
    "correction": Correction,
    "critic": CriticSettings,
}


def _override(kind: type, where: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Checks option names against a settings class, and builds its nested ones from mappings."""
    known = [field.name for field in dataclasses.fields(kind)]
    result = dict(values)
    for option, value in result.items():
        if option not in known:
            near = difflib.get_close_matches(option, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"unknown option {where}{option}; {hint}")
        if kind is Recipe and option in _SECTIONS and isinstance(value, Mapping):
            section = _SECTIONS[option]
            result[option] = section(**_override(section, f"{where}{option}.", value))
    return result


def make_algorithm(
    name: str = "grpo",
    *,
    modulation: str = "none",
    num_minibatches: int = 1,
    group_size: int | None = None,
    **overrides: Any,
) -> Algorithm:
    """Builds an algorithm by name.

    Args:
      name: a key of `ALGORITHMS`.
      modulation: ``empg`` or ``aem`` on top of a recipe without one; ``none`` leaves the recipe as it is.
      num_minibatches: optimizer steps that each batch is split into.
      group_size: attempts of each task, if known; with 1, AEM's scope ``group`` becomes ``batch``, and warns.
      **overrides: fields of `Recipe` that differ from the named one; ``empg``, ``aem``, ``correction`` and
        ``critic`` may be mappings of the options that differ from their defaults.

    Returns:
      The pair of pure functions.

    Raises:
      ValueError: for an unknown name, option or choice, and for two modulations.
    """
    check_choice("algorithm name", name, tuple(ALGORITHMS))
    check_choice("modulation", modulation, MODULATIONS)
    recipe = ALGORITHMS[name]
    if "none" not in (modulation, recipe.modulation) and modulation != recipe.modulation:
        raise ValueError(
            f"one modulation only: {name!r} means {recipe.modulation!r}, and modulation is {modulation!r}"
        )
    options = _override(Recipe, "", overrides)
    if modulation != "none":
        options["modulation"] = modulation
    recipe = dataclasses.replace(recipe, **options)
    if recipe.modulation == "aem" and recipe.aem.scope == "group" and group_size == 1:
        warnings.warn('group_size=1: AEM\'s scope="group" falls back to scope="batch"', stacklevel=2)
        recipe = dataclasses.replace(recipe, aem=dataclasses.replace(recipe.aem, scope="batch"))
    return build(recipe, num_minibatches=num_minibatches)
