"""Objectives by name: each binds a per-token loss of `losses` to the carriers that the learner hands over.

An entry of `OBJECTIVES` takes the recipe and returns ``(logprobs, rows, scores, advantages) -> (loss, metrics)``.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from empg_jax.algorithms.losses import ppo_clip
from empg_jax.types import Batch, Scores

Objective = Callable[..., tuple[Float[Array, "B T"], dict[str, Float[Array, "B T"]]]]


def clip_range(recipe: Any, low: float, high: float) -> dict[str, Any]:
    """The recipe's clip range, with the objective's own defaults where it has none."""
    return {
        "clip_low": low if recipe.clip_low is None else recipe.clip_low,
        "clip_high": high if recipe.clip_high is None else recipe.clip_high,
    }


def clipped_share(
    ratios: Float[Array, "B T"], advantages: Float[Array, "B T"], bounds: dict[str, Any]
) -> Float[Array, "B T"]:
    """1 where the clip stops the gradient: beyond the range on the side that the advantage pushes to."""
    above = (ratios > 1 + bounds["clip_high"]) & (advantages > 0)
    below = (ratios < 1 - bounds["clip_low"]) & (advantages < 0)
    return (above | below).astype(ratios.dtype)


def make_ppo_clip(recipe: Any) -> Objective:
    """`ppo_clip` with the recipe's range and dual clip."""
    bounds = clip_range(recipe, 0.2, 0.2)

    def objective(
        logprobs: Float[Array, "B T"], rows: Batch, scores: Scores, advantages: Float[Array, "B T"]
    ) -> tuple[Float[Array, "B T"], dict[str, Float[Array, "B T"]]]:
        loss = ppo_clip(logprobs, scores.old_logprobs, advantages, dual_clip=recipe.dual_clip, **bounds)
        ratios = jnp.exp(logprobs - scores.old_logprobs)
        return loss, {"clip_fraction": clipped_share(ratios, advantages, bounds)}

    return objective


OBJECTIVES: dict[str, Callable[[Any], Objective]] = {"ppo_clip": make_ppo_clip}
