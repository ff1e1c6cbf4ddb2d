"""Choice of the turns that the loss covers. Other turns leave the denominator, but not the statistics.

Only a filter (`drop_uniform`) takes its turns out of the statistics of the modulation, too.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool

from empg_jax.algorithms.advantages import has_spread
from empg_jax.algorithms.contract import Turns
from empg_jax.algorithms.masking import check_choice
from empg_jax.algorithms.part import Part
from empg_jax.types import Batch

UNITS = ("turn", "trajectory")


def _without(bad: Bool[Array, "N K"], unit: str) -> Bool[Array, "N K"]:
    """Choose the turns that stay: all but the bad ones, or all but those of a trajectory with a bad one."""
    return ~bad if unit == "turn" else jnp.broadcast_to(~jnp.any(bad, axis=1, keepdims=True), bad.shape)


def mask_truncated(*, unit: Literal["turn", "trajectory", "limit"] = "turn") -> Part:
    """Leave out what a limit cut: overlong filtering (DAPO, arXiv 2503.14476; ``limit``: DeepSWE).

    Args:
      unit: Leave out turns cut by the token limit, episodes with one, or (limit) episodes ended by a limit.
    """
    check_choice("mask_truncated", unit, (*UNITS, "limit"))

    def keep(batch: Batch, turns: Turns) -> Bool[Array, "N K"]:
        is_cut = batch.truncated[:, None] if unit == "limit" else batch.turn_truncated
        return _without(turns.mask & is_cut, unit)

    return Part("mask_truncated", {"unit": unit}, keep)


def drop_void(*, unit: Literal["turn", "trajectory"] = "turn") -> Part:
    """Leave out turns without a valid action: void-turn filtering (SimpleTIR, arXiv 2509.02479).

    Args:
      unit: Leave out turns without a valid action, or whole episodes with such a turn.
    """
    check_choice("drop_void", unit, UNITS)

    def keep(batch: Batch, turns: Turns) -> Bool[Array, "N K"]:
        return _without(turns.mask & ~batch.turn_valid, unit)

    return Part("drop_void", {"unit": unit}, keep)


def drop_uniform(*, unit: Literal["group"] = "group") -> Part:
    """Leave out groups whose attempts all have one raw return: dynamic filtering without another sample.

    As that removes them beforehand, a modulation does not see them.

    Args:
      unit: Leave out the groups whose attempts all have one return.
    """
    check_choice("drop_uniform", unit, ("group",))

    def keep(batch: Batch, turns: Turns) -> Bool[Array, "N K"]:
        return turns.mask & has_spread(batch.returns, batch.group_ids)[:, None]

    return Part("drop_uniform", {"unit": unit}, keep, is_filter=True)
