"""Lists of what there is to choose from: environments, packaged configurations, algorithms."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from empg_envs import ENVS, EnvSpec
from empg_jax.config.yaml import find_packaged


def list_envs() -> Iterator[tuple[str, str]]:
    """Yield every environment's name, and what it is, its levels and its panels in one line.

    Panels are those of the default options; where these need something that is not here, the line says what.
    """
    for name, spec in ENVS.items():
        yield name, "; ".join([*_describe(spec), _panels(spec)])


def list_configs() -> Iterator[tuple[str, str]]:
    """Yield every packaged configuration's name and what it is."""
    yield from find_packaged().items()


def list_algorithms() -> Iterator[tuple[str, str]]:
    """Yield every algorithm's name and its recipe in words."""
    # Imported here, because it loads JAX, which the other lists do not need.
    from empg_jax.algorithms import ALGORITHMS, RECIPES, describe_recipe

    for name, recipe in ALGORITHMS.items():
        base = next(each for each in sorted(RECIPES, key=len, reverse=True) if name.startswith(each))
        yield name, describe_recipe(recipe, base)


def format_list(entries: Iterator[tuple[str, str]]) -> str:
    """Format one line per entry, the names padded to one width."""
    found = list(entries)
    width = max(len(name) for name, _ in found)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in found)


def _describe(spec: EnvSpec) -> Iterator[str]:
    """Yield the first sentence of the class's docstring, and the levels that its constructor names."""
    target = spec.make.resolve() if hasattr(spec.make, "resolve") else spec.make
    yield _first_sentence(inspect.getdoc(target))
    text = inspect.getdoc(getattr(target, "__init__", None)) or ""
    entry = re.search(r"^ *level: (.*(?:\n   {2,}.*)*)", text, re.M)
    levels = re.findall(r"``(\w+)``", entry.group(1)) if entry else []
    if levels:
        yield f"level: {', '.join(dict.fromkeys(levels))}"


def _first_sentence(text: str | None) -> str:
    paragraph = " ".join((text or "").partition("\n\n")[0].split()).replace("`", "")
    return re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0].rstrip(".")


def _panels(spec: EnvSpec) -> str:
    try:
        env = spec.make()
        sizes = [f"{split} {env.num_tasks(split)}" for split in env.list_splits()]
        env.close()
    except Exception as error:  # data or programs that are not on this machine: an environment says what
        return f"not ready here: {' '.join(str(error).split())}"
    return f"tasks: {', '.join(sizes)}"
