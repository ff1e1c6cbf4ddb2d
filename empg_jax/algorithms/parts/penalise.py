"""Penalties, which are subtracted from rewards before the estimator runs."""

import jax.numpy as jnp

from empg_jax.algorithms import advantages
from empg_jax.algorithms.contract import Penalties, Turns
from empg_jax.algorithms.masking import Length, NonNegative
from empg_jax.algorithms.part import Part, default_of
from empg_jax.types import Batch


def turn_penalty(amount: NonNegative) -> Part:
    """Subtract an amount from every turn whose response the parser did not accept.

    Args:
      amount: Penalty of such a turn.
    """

    def penalise(batch: Batch, turns: Turns) -> Penalties:
        invalid = turns.mask & ~batch.turn_valid
        costs = jnp.where(invalid, jnp.asarray(amount, jnp.float32), 0)
        return Penalties(costs, jnp.zeros(costs.shape[0], costs.dtype))

    return Part("turn_penalty", {"amount": amount}, penalise)


def overlong(
    length: Length, cache: Length, *, factor: NonNegative = default_of(advantages.overlong_penalty, "factor")
) -> Part:
    """Subtract `overlong_penalty` from the return of an episode that sampled too many tokens.

    Args:
      length: Sampled tokens from which on an episode loses the whole penalty (DAPO); null is off.
      cache: Width in tokens of the ramp that leads to that penalty.
      factor: Penalty at that length and beyond.
    """

    def penalise(batch: Batch, turns: Turns) -> Penalties:
        lengths = jnp.sum(turns.token_counts, axis=1)
        taken = -advantages.overlong_penalty(lengths, max_length=length, cache_length=cache, factor=factor)
        return Penalties(jnp.zeros(turns.mask.shape, taken.dtype), taken)

    advantages.overlong_penalty(jnp.zeros(1), max_length=length, cache_length=cache)  # refuses a bad ramp
    return Part("overlong", {"length": length, "cache": cache, "factor": factor}, penalise)
