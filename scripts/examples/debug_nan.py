"""Find a NaN and go on: an algorithm that divides by zero where a whole group wins. In this folder, say:

1. empg-jax train quickstart algorithm.entry_point=debug_nan:RECIPE run_dir=nan   # stops; no harm is done
2. empg-jax inspect nan                      # credit.advantages, of which episodes, with their returns
3. FLOOR=1e-3 empg-jax train --resume nan    # with the mistake mended, from the last good checkpoint

The recipe is tried on a small batch before a run begins, so most mistakes never get that far. This one
depends on what the policy does: no group of that batch wins as a whole.
"""

import os

import jax.numpy as jnp

from empg_jax.algorithms import Recipe

FLOOR = float(os.environ.get("FLOOR", 0))  # the remedy, in place of an editor


def hard_tasks_count_more(batch, scores, worth):
    """Return less the group's mean, divided by the share that failed: 0 / 0 if none did."""
    is_there = batch.group_ids >= 0
    alike = (batch.group_ids[:, None] == batch.group_ids[None, :]) & is_there[:, None] & is_there[None, :]
    mean = jnp.where(alike, worth.returns[None, :], 0.0).sum(-1) / jnp.maximum(alike.sum(-1), 1)
    failed = jnp.maximum(1.0 - mean, FLOOR)
    advantages = jnp.where(is_there, (worth.returns - mean) / failed, 0.0)
    return jnp.broadcast_to(advantages[:, None], worth.mask.shape)


RECIPE = Recipe(estimate=hard_tasks_count_more)
