"""Description of a recipe in one line, for messages."""

from collections.abc import Mapping
from typing import Any

from empg_jax.algorithms.part import name_of
from empg_jax.algorithms.recipe import Recipe

_TITLES = {
    "reinforce": "REINFORCE",
    "rloo": "RLOO",
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "grpo_turn_rows": "GRPO on turn rows",
    "dapo": "DAPO",
    "gspo": "GSPO",
    "cispo": "CISPO",
    "sapo": "SAPO",
    "gigpo": "GiGPO",
    "reinforce_pp": "REINFORCE++",
    "reinforce_pp_baseline": "REINFORCE++ baseline",
    "ppo": "PPO",
    "hgpo": "HGPO",
    "crbc": "CRBC",
    "graph_hca": "GraphHCA",
    "graft": "GRAFT",
    "graph_gpo": "GraphGPO",
    "gagpo": "GAGPO",
    "turn_ppo": "Turn-PPO",
    "beacon": "BEACON",
    "igpo": "IGPO",
    "a2tgpo": "A2TGPO",
    "erc": "GRPO with entropy ratio clipping",
    "sampo": "SAMPO",
}


def _modulation(recipe: Recipe) -> str:
    """Name the modulation with its settings; options off their usual value only where they say something."""
    options: Mapping[str, Any] = getattr(recipe.modulate, "options", {})
    controls = [word for word, on in (("reversed", options.get("reverse")),) if on]
    controls += ["shuffled"] if options.get("shuffle_seed") is not None else []
    if name_of(recipe.modulate) == "empg":
        parts = [f"k={options['k']:g}", f"k'={options['k_future']:g}", f"zeta={options['zeta']:g}"]
        parts += [options["scope"], *([] if options["center"] == "turn" else [f"center={options['center']}"])]
        parts += [word for word in ("whiten", "mixed_groups_only") if options[word]]
        return f"EMPG ({', '.join([*parts, *controls])})"
    if name_of(recipe.modulate) == "aem":
        parts = [f"lambda={options['lam']:g}", options["scope"], f"min_range={options['min_range']:g}"]
        parts += [f"mean={options['mean']}"] if options["mean"] != "turn" else []
        parts += [f"center={options['center']}"] if options["center"] != "none" else []
        return f"AEM ({', '.join([*parts, *controls])})"
    return name_of(recipe.modulate)


def _settings(part: Any) -> str:
    """Name a part with its settings."""
    options = getattr(part, "options", {})
    words = [
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in options.items()
    ]
    return f"{name_of(part)}({', '.join(words)})" if words else name_of(part)


def describe_recipe(recipe: Recipe, name: str, usual: Recipe | None = None) -> str:
    """Name an algorithm in full: ``GRPO + EMPG (k=1, k'=1, zeta=0.05, batch)``.

    Args:
      recipe: the algorithm.
      name: of the recipe that it began as.
      usual: that recipe; what differs from it is listed behind. None lists the parts of a recipe of one's
        own.
    """
    title = _TITLES.get(name, name)
    line = title if recipe.modulate is None else f"{title} + {_modulation(recipe)}"
    extra = []
    for slot in ("estimate", "objective", "aggregate", "kl", "critic"):
        part, known = getattr(recipe, slot), None if usual is None else getattr(usual, slot)
        same = known is part or (
            name_of(known) == name_of(part) and getattr(known, "options", 0) == getattr(part, "options", 1)
        )
        if part is not None and not same:
            extra.append(_settings(part))
    for slot in ("penalise", "correct", "keep"):
        extra += [_settings(part) for part in getattr(recipe, slot)]
    if recipe.entropy_coef:
        extra.append(f"entropy_coef={recipe.entropy_coef:g}")
    return "; ".join([line, *extra])
