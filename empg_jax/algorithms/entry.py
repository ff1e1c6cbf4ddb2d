"""A recipe of the user's own: found by ``package.module:ATTRIBUTE``, with a fingerprint of its source."""

import hashlib
import importlib
import os
import sys
import traceback
from pathlib import Path

import jax

from empg_jax.algorithms.recipe import Recipe


def load_recipe(entry_point: str) -> Recipe:
    """Find a recipe by entry point; modules of the current folder are found too.

    Args:
      entry_point: ``package.module:ATTRIBUTE``.

    Raises:
      ValueError: the module or attribute is missing, cannot be read, or is no recipe; the message names it.
    """
    module_name, _, attribute = entry_point.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # as a console script, unlike python -m, does not
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{entry_point}: there is no module {error.name!r}") from None
    except SyntaxError as error:
        raise ValueError(f"{entry_point}: {error.filename}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        raise ValueError(
            f"{entry_point}: {module_name} cannot be imported: {type(error).__name__}: {error} "
            f"({place_of(error)})"
        ) from None
    if not hasattr(module, attribute):
        recipes = [name for name, value in vars(module).items() if isinstance(value, Recipe)]
        hint = f"; its recipes: {', '.join(recipes)}" if recipes else ""
        raise ValueError(f"{entry_point}: module {module_name!r} has no attribute {attribute!r}{hint}")
    recipe = getattr(module, attribute)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{entry_point} is a {type(recipe).__name__}, not an empg_jax.algorithms.Recipe")
    return recipe


def place_of(error: Exception) -> str:
    """Where it happened: the innermost line that is not JAX's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(os.path.dirname(jax.__file__))]
    return f"{own[-1].filename}, line {own[-1].lineno}"


def source_hash(entry_point: str) -> str:
    """Return a fingerprint of the module's source; of code that it imports nothing is in it.

    Args:
      entry_point: as of `load_recipe`, which has found it.
    """
    file = getattr(importlib.import_module(entry_point.partition(":")[0]), "__file__", None)
    return hashlib.sha256(b"" if file is None else Path(file).read_bytes()).hexdigest()[:16]
