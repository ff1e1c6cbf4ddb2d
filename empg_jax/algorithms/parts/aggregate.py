"""Aggregation of token losses to one number: the share of each token in its mini-batch.

A *sequence* in these modes is a unit: the packed ``segment`` (a transcript, or the pieces that a chat
template splits it into; a turn in window context), the ``trajectory``, or the ``turn``.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from empg_jax.algorithms.aggregation import minibatch_weights
from empg_jax.algorithms.masking import Positive, check_choice
from empg_jax.algorithms.part import Part
from empg_jax.types import Batch

UNITS = ("segment", "trajectory", "turn")


def unit_ids(rows: Batch, unit: str) -> Int[Array, "B T"]:
    """Number the unit of each trained token; -1 elsewhere.

    Args:
      rows: any rows of a batch.
      unit: ``segment``, ``trajectory`` or ``turn``.
    """
    check_choice("unit", unit, UNITS)
    if unit == "segment":
        ids = rows.sequence_ids
    elif unit == "trajectory":
        ids = rows.trajectory_ids
    else:
        ids = rows.trajectory_ids * rows.turn_valid.shape[1] + rows.turn_ids
    return jnp.where(rows.loss_mask, ids, -1)


def _bind(mode: str, unit: str = "segment", scale: Positive | None = None) -> Part:
    check_choice("aggregation_unit", unit, UNITS)

    def aggregate(batch: Batch, kept: Bool[Array, "B T"], num_minibatches: int) -> Float[Array, "B T"]:
        ids = unit_ids(batch, unit)
        return minibatch_weights(
            kept, batch.minibatch_ids, num_minibatches, mode=mode, sequence_ids=ids, scale=scale
        )

    return Part(mode, {"unit": unit, "scale": scale}, aggregate)


def token_mean() -> Part:
    """Bind the mean over the tokens of the mini-batch."""
    return _bind("token-mean")


def seq_mean_token_mean(*, unit: Literal["segment", "trajectory", "turn"] = "segment") -> Part:
    """Bind the mean over units of the mean over their tokens.

    Args:
      unit: Unit that counts as a sequence in the aggregation of losses.
    """
    return _bind("seq-mean-token-mean", unit)


def seq_mean_token_sum(*, unit: Literal["segment", "trajectory", "turn"] = "segment") -> Part:
    """Bind the mean over units of the sum over their tokens.

    Args:
      unit: Unit that counts as a sequence in the aggregation of losses.
    """
    return _bind("seq-mean-token-sum", unit)


def seq_mean_token_sum_norm(*, scale: Positive | None = None) -> Part:
    """Bind the sum over all tokens, divided by a constant.

    Args:
      scale: Constant divisor of the token sums; null is the row length.
    """
    return _bind("seq-mean-token-sum-norm", scale=scale)


def seq_mean_token_const(
    *, unit: Literal["segment", "trajectory", "turn"] = "segment", scale: Positive | None = None
) -> Part:
    """Bind the mean over units of the sum over their tokens divided by a constant (Dr. GRPO).

    Args:
      unit: Unit that counts as a sequence in the aggregation of losses.
      scale: Constant divisor of the token sums; null is the row length.
    """
    return _bind("seq-mean-token-const", unit, scale)
