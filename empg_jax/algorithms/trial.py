"""The trial of a recipe of the user's own: it runs once on a small made-up batch, before a run is built."""

import dataclasses
import os
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from empg_jax.algorithms.compose import build
from empg_jax.algorithms.contract import Penalties
from empg_jax.algorithms.entry import place_of
from empg_jax.algorithms.part import Correction, Part, name_of
from empg_jax.algorithms.recipe import Recipe
from empg_jax.types import Batch, Credit, Scores

# What the places of a recipe give that no other check looks at: a pair, or tokens.
_PAIRS = {"objective": "(loss, metrics)", "kl": "(kl, weight)", "critic": "(loss, weight)"}
_OF_TOKENS = (*_PAIRS, "accept", "weigh", "limit")
_OF_CORRECTIONS = ("accept", "weigh", "limit", "mean_weight")

Found = dict[str, Any]  # what each part returned, by its name


def try_recipe(recipe: Recipe, label: str) -> None:
    """Run a recipe once, compiled, on a small made-up batch: shapes, types, finite numbers and gradients.

    Args:
      recipe: the algorithm.
      label: name of the recipe in messages.

    Raises:
      ValueError: naming the function that failed, returned a wrong shape, or numbers that are not finite.
    """
    batch, scores = _small_batch()
    scores = dataclasses.replace(
        scores,
        values=None if recipe.critic is None else scores.values,
        ref_logprobs=scores.ref_logprobs if recipe.needs_reference else None,
    )
    names: list[str] = []
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            results, slopes, credit = jax.jit(lambda *streams: _run(recipe, names, *streams))(batch, scores)
    except Exception as error:
        text, where = f"{type(error).__name__}: {error}".splitlines()[0], f" ({place_of(error)})"
        if isinstance(error, ValueError) and _is_ours(error):
            text, where = str(error).splitlines()[0], ""
        elif "NoneType" in text and not recipe.needs_reference:
            text += "; scores.ref_logprobs is None unless a part says that it needs it: Part(..., needs=...)"
        raise ValueError(f"{label}: {text}{where}") from None
    masks = {credit.turns.mask.shape: credit.turns.mask, batch.loss_mask.shape: batch.loss_mask}
    for name, tree in zip(names, results, strict=True):
        is_final = name == name_of(recipe.aggregate)  # also where there is no token: 0 times NaN is NaN
        for leaf in map(np.asarray, jax.tree.leaves(tree)):
            mask = True if is_final else masks.get(leaf.shape, True)
            if not np.isfinite(np.where(mask, leaf.astype(np.float32), 0)).all():
                raise ValueError(f"{label}: {name} returned numbers that are not finite (NaN or infinite)")
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes)):
        parts = ", ".join(name_of(part) for part in (recipe.objective, recipe.kl) if part is not None)
        raise ValueError(
            f"{label}: the gradient of the loss is not finite where nothing has changed ({parts})"
        )


def _run(recipe: Recipe, names: list[str], batch: Batch, scores: Scores) -> tuple[list[Any], Any, Credit]:
    """Return what the parts gave, the gradient of the loss, and the credit; add the parts' names."""
    found: Found = {}
    algorithm = build(_watched(recipe, found))
    credit = algorithm.credit(batch, scores)
    scores = dataclasses.replace(scores, clip_scale=credit.clip_scale)
    trained = dataclasses.replace(batch, loss_mask=credit.loss_weights != 0)  # as the learner gives it

    def total(logprobs: jax.Array, entropies: jax.Array) -> tuple[jax.Array, Found]:
        found.clear()
        losses, _ = algorithm.loss(logprobs, entropies, trained, scores, credit.advantages)
        return jnp.sum(jnp.where(trained.loss_mask, losses * credit.loss_weights, 0)), dict(found)

    before = dict(found)
    slopes, of_loss = jax.grad(total, argnums=(0, 1), has_aux=True)(scores.old_logprobs, scores.entropies)
    found.clear()
    if algorithm.value_loss is not None:
        algorithm.value_loss(scores.values, batch, scores, credit.value_targets)
    found = before | of_loss | found
    names += found
    return list(found.values()), slopes, credit


def _watched(recipe: Recipe, found: Found) -> Recipe:
    """Return the recipe with parts whose results are checked, and kept in ``found`` by their names."""
    changes: dict[str, Any] = {}
    for slot in ("estimate", "modulate", "objective", "aggregate", "kl", "critic"):
        part = getattr(recipe, slot)
        changes[slot] = None if part is None else _watch(part, slot, found)
    for slot in ("penalise", "keep"):
        changes[slot] = tuple(_watch(part, slot, found) for part in getattr(recipe, slot))
    changes["correct"] = tuple(_watch_correction(item, found) for item in recipe.correct)  # type: ignore
    return dataclasses.replace(recipe, **changes)


def _watch(part: Any, slot: str, found: Found) -> Any:
    call = _checking(part, slot, name_of(part), found)
    if isinstance(part, Part):
        return dataclasses.replace(part, function=call)
    for name in ("needs", "scales_clip", "is_filter", "options"):
        if hasattr(part, name):
            setattr(call, name, getattr(part, name))
    call.name = name_of(part)  # type: ignore[attr-defined]
    return call


def _watch_correction(item: Correction, found: Found) -> Correction:
    parts: dict[str, Any] = {slot: getattr(item, slot) for slot in _OF_CORRECTIONS}
    for slot, part in parts.items():
        parts[slot] = None if part is None else _checking(part, slot, item.name, found)
    return dataclasses.replace(item, **parts)


def _checking(part: Callable[..., Any], slot: str, name: str, found: Found) -> Callable[..., Any]:
    """Return a function that calls a part, checks its result, and adds it to what was found."""

    def call(*args: Any) -> Any:
        result = part(*args)
        if slot in _PAIRS and not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError(f"{name} returned {type(result).__name__}; expected {_PAIRS[slot]}")
        if slot == "penalise" and not isinstance(result, Penalties):
            raise ValueError(f"{name} returned {type(result).__name__}; expected Penalties: turns, episodes")
        if slot in _OF_TOKENS:
            batch = next((arg for arg in args if isinstance(arg, Batch)), None)
            shape = jnp.shape(args[0] if batch is None else batch.loss_mask)
            given = jnp.shape(result[0] if slot in _PAIRS else result)
            if given != shape:
                raise ValueError(f"{name} ({slot}) returned shape {given}; expected float[B, T] = {shape}")
        found[name] = (found.get(name), result)
        return result

    return call


def _is_ours(error: Exception) -> bool:
    """Whether a message is of this package, which needs no line of source beside it."""
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(os.path.dirname(__file__))


def _small_batch() -> tuple[Batch, Scores]:
    """Make up two groups of two, two turns of two tokens each; one group won once, the other never.

    As in a run, there is a row without a token, and a place without a trajectory.
    """
    rows, length, turns = 5, 8, 2
    place = np.arange(length)[None, :] + np.zeros((rows, 1), int)
    is_there = np.arange(rows) < rows - 1
    mask = (place % 4 >= 2) & is_there[:, None]
    owner = np.where(is_there, np.arange(rows), -1)[:, None] + 0 * place
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
        segment_ids=ints(0 * place + is_there[:, None]),
        positions=ints(place),
        trunk_ids=ints(0 * place - 1),
        sequence_ids=ints(owner),
        trajectory_ids=ints(owner),
        turn_ids=ints(place // 4),
        behavior_logprobs=behavior,
        behavior_entropies=stream(0.1, 2.0),
        minibatch_ids=ints(is_there - 1),
        returns=jnp.asarray(rewards.sum(1)),
        group_ids=ints([0, 0, 1, 1, -1]),
        trajectory_mask=jnp.asarray(is_there),
        success=jnp.asarray([True, *[False] * 4]),
        truncated=jnp.asarray([False, False, False, True, False]),
        scored_zero=jnp.zeros(rows, bool),
        last_anchor_ids=ints([2, 0, 2, -1, -1]),
        turn_rewards=jnp.asarray(rewards),
        turn_truncated=table(False),
        turn_valid=table(True).at[2, 0].set(False),
        anchor_ids=ints(np.tile([0, 1], (rows, 1))),
        action_ids=ints(np.tile([0, 1], (rows, 1))),
        milestones=table(False).at[1, 0].set(True),
        answer_logprobs=jnp.asarray([[-2.0, -1.0]] * rows),
        versions=ints(np.zeros((rows, turns))),
    )
    return batch, Scores(logprobs, stream(0.1, 2.0), stream(-2.0, -0.1), values)
