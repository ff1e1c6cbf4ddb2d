"""A recipe with some keys of a configuration laid over it."""

from collections.abc import Callable, Mapping
from typing import Any

from empg_jax.algorithms import parts
from empg_jax.algorithms.keys import Chosen, Spec, resolve
from empg_jax.algorithms.part import Correction, Part, name_of
from empg_jax.algorithms.recipe import Recipe
from empg_jax.algorithms.signatures import FACTORIES

SLOTS = ("estimate", "penalise", "modulate", "objective", "correct", "keep", "aggregate", "kl", "critic")
_SEVERAL = ("penalise", "correct", "keep")


def _parts_of(recipe: Recipe, slot: str) -> tuple[Any, ...]:
    value = getattr(recipe, slot)
    return value if slot in _SEVERAL else () if value is None else (value,)


def _factory(slot: str, part: Any) -> str | None:
    """Name the factory that a part came from; None for a function of the user's own."""
    known = isinstance(part, Part | Correction) and part.name in FACTORIES.get(slot, {})
    return part.name if known else None


def spec_of(recipe: Recipe) -> Spec:
    """Describe a recipe by names and options."""
    spec = {
        slot: tuple(
            Chosen(_factory(slot, part), dict(getattr(part, "options", {})), name_of(part))
            for part in _parts_of(recipe, slot)
        )
        for slot in SLOTS
    }
    return spec | {"entropy": (Chosen(None, {"entropy_coef": recipe.entropy_coef}),)}


def _make(slot: str, chosen: Chosen) -> Any:
    """Make a part by its factory."""
    assert chosen.factory is not None
    factory: Callable[..., Any] = getattr(parts, chosen.factory.replace("-", "_"))
    names = FACTORIES[slot][chosen.factory]
    return factory(**{name: value for name, value in chosen.options.items() if name in names})


def configure(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Exchange parts of a recipe, and options of its parts, as the keys say.

    Args:
      recipe: the recipe to start from; not changed.
      values: dotted keys (`empg_jax.algorithms.keys`).

    Raises:
      ValueError: for a key that no chosen part reads (the message names what would), an unknown key or
        choice, or parts that do not go together.
    """
    before = spec_of(recipe)
    resolved = resolve(before, values)
    if resolved.idle:
        raise ValueError("\n".join(resolved.idle.values()))
    fields: dict[str, Any] = {"entropy_coef": values.get("entropy_coef", recipe.entropy_coef)}
    for slot in SLOTS:
        made = []
        for chosen in resolved.spec[slot]:
            kept = [
                part for was, part in zip(before[slot], _parts_of(recipe, slot), strict=True) if was == chosen
            ]
            made.append(kept[0] if kept else _make(slot, chosen))
        fields[slot] = tuple(made) if slot in _SEVERAL else made[0] if made else None
    return Recipe(**fields)
