"""An algorithm of your own: a group's best attempts get credit by their few turns. In this folder, say:

empg-jax train quickstart algorithm.entry_point=own_algorithm:RECIPE
"""

import jax.numpy as jnp

from empg_jax.algorithms import Recipe, parts


def short_wins(batch, scores, worth):
    """Advantages [N, K]: 1 / turns for attempts with their group's best return, less the group's mean.

    `worth.returns` float[N], `worth.mask` bool[N, K] (turns), `batch.group_ids` int[N] (-1: padding).
    """
    is_there = batch.group_ids >= 0
    alike = (batch.group_ids[:, None] == batch.group_ids[None, :]) & is_there[:, None] & is_there[None, :]
    best = jnp.where(alike, worth.returns[None, :], -jnp.inf).max(-1)
    turns = jnp.maximum(worth.mask.sum(-1), 1)
    gain = jnp.where(is_there & (worth.returns == best), 1.0 / turns, 0.0)
    mean = jnp.where(alike, gain[None, :], 0.0).sum(-1) / jnp.maximum(alike.sum(-1), 1)
    return jnp.broadcast_to((gain - mean)[:, None], worth.mask.shape)


# Every estimator composes with every modulation, objective, correction and aggregation (help(Recipe)).
RECIPE = Recipe(
    estimate=short_wins,
    modulate=parts.aem(),
    objective=parts.ppo_clip(clip_high=0.28),
    aggregate="seq-mean-token-mean",
)
