"""A recipe of the user's own: found by ``package.module:ATTRIBUTE``, and tried once before a run is built."""

import dataclasses
import importlib
import os
import sys
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from empg_jax.algorithms.compose import Algorithm, build
from empg_jax.algorithms.part import name_of
from empg_jax.algorithms.recipe import Recipe
from empg_jax.types import Batch, Scores


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
            f"({_place_of(error)})"
        ) from None
    if not hasattr(module, attribute):
        recipes = [name for name, value in vars(module).items() if isinstance(value, Recipe)]
        hint = f"; its recipes: {', '.join(recipes)}" if recipes else ""
        raise ValueError(f"{entry_point}: module {module_name!r} has no attribute {attribute!r}{hint}")
    recipe = getattr(module, attribute)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{entry_point} is a {type(recipe).__name__}, not an empg_jax.algorithms.Recipe")
    return recipe


def _place_of(error: Exception) -> str:
    """Where it happened: the innermost line that is not JAX's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(os.path.dirname(jax.__file__))]
    return f"{own[-1].filename}, line {own[-1].lineno}"


def try_recipe(recipe: Recipe, label: str) -> None:
    """Run a recipe once, compiled, on a small made-up batch: shapes, types and finite numbers.

    Args:
      recipe: the algorithm.
      label: name of the recipe in messages.

    Raises:
      ValueError: naming the function that failed, returned a wrong shape, or NaN.
    """
    batch, scores = _small_batch()
    if recipe.critic is None:
        scores = dataclasses.replace(scores, values=None)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        _try(recipe, label, batch, scores)


def _try(recipe: Recipe, label: str, batch: Batch, scores: Scores) -> None:
    algorithm: Algorithm = build(recipe)
    try:
        credit = jax.jit(algorithm.credit)(batch, scores)
        scores = dataclasses.replace(scores, clip_scale=credit.clip_scale)
        streams = (scores.old_logprobs, scores.entropies, batch, scores, credit.advantages)
        loss, metrics = jax.jit(algorithm.loss)(*streams)
        found: dict[str, Any] = {}
        if algorithm.value_loss is not None:
            values = jax.jit(algorithm.value_loss)(scores.values, batch, scores, credit.value_targets)
            found = {name_of(recipe.critic): values}
    except Exception as error:
        where = "" if isinstance(error, ValueError) else f" ({_place_of(error)})"
        text = f"{type(error).__name__}: {error}" if where else str(error)
        raise ValueError(f"{label}: {text.splitlines()[0]}{where}") from None
    assert credit.turns is not None
    found = {
        name_of(recipe.estimate): credit.turns.base,
        name_of(recipe.modulate): credit.turns.advantages,
        name_of(recipe.aggregate): credit.loss_weights,
        name_of(recipe.objective): (loss, metrics),
    } | found
    for name, tree in found.items():
        for leaf in jax.tree.leaves(tree):
            if leaf is None or not np.isfinite(np.asarray(leaf, np.float32)).all():
                raise ValueError(f"{label}: {name} returned numbers that are not finite (NaN or infinite)")


def _small_batch() -> tuple[Batch, Scores]:
    """Make up two groups of two, two turns of two tokens each; one group won once, the other never."""
    rows, length, turns = 4, 8, 2
    place = np.arange(length)[None, :] + np.zeros((rows, 1), int)
    mask, owner = place % 4 >= 2, np.arange(rows)[:, None] + 0 * place
    rng = np.random.default_rng(0)

    def stream(low: float, high: float) -> jax.Array:
        return jnp.asarray(np.where(mask, rng.uniform(low, high, (rows, length)), 0), jnp.float32)

    def ints(values: Any) -> jax.Array:
        return jnp.asarray(values, jnp.int32)

    def table(values: Any) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(values), (rows, turns))

    logprobs, behavior, values = stream(-2.0, -0.1), stream(-2.0, -0.1), stream(-1.0, 1.0)
    rewards = np.zeros((rows, turns), np.float32)
    rewards[0, 1] = 1.0
    batch = Batch(
        tokens=ints(place + 1),
        loss_mask=jnp.asarray(mask),
        segment_ids=ints(0 * place + 1),
        positions=ints(place),
        trunk_ids=ints(0 * place - 1),
        sequence_ids=ints(owner),
        trajectory_ids=ints(owner),
        turn_ids=ints(place // 4),
        behavior_logprobs=behavior,
        behavior_entropies=stream(0.1, 2.0),
        minibatch_ids=ints(np.zeros(rows)),
        returns=jnp.asarray(rewards.sum(1)),
        group_ids=ints([0, 0, 1, 1]),
        trajectory_mask=jnp.ones(rows, bool),
        success=jnp.asarray([True, False, False, False]),
        truncated=jnp.asarray([False, False, False, True]),
        scored_zero=jnp.zeros(rows, bool),
        last_anchor_ids=ints([2, 0, 2, -1]),
        turn_rewards=jnp.asarray(rewards),
        turn_truncated=table(False),
        turn_valid=table(True).at[2, 0].set(False),
        anchor_ids=ints(np.tile([0, 1], (rows, 1))),
        action_ids=ints(np.tile([0, 1], (rows, 1))),
        milestones=table(False).at[1, 0].set(True),
        answer_logprobs=jnp.asarray([[-2.0, -1.0]] * rows),
        versions=ints(np.zeros((rows, turns))),
    )
    return batch, Scores(logprobs, stream(0.1, 2.0), logprobs, values)
