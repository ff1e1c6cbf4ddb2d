"""Aggregation of token losses to one number, by weights that contain mask and normalizer."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from empg_jax.algorithms.masking import Arr, Scalar, as_ids, as_mask, check_choice, check_shapes
from empg_jax.algorithms.segments import sequence_segments

AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-const",
)
SEQUENCE_MODES = ("seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-const")
SCALED_MODES = ("seq-mean-token-sum-norm", "seq-mean-token-const")


def loss_weights(
    loss_mask: Shaped[Arr, "B T"],
    *,
    mode: str = "token-mean",
    sequence_ids: Int[Arr, "B T"] | None = None,
    scale: Scalar | None = None,
) -> Float[Array, "B T"]:
    """Compute each token's share in the loss, so that the aggregated loss is ``sum(loss * weights)``.

    With n_i trained tokens in sequence i, B sequences that have any, and l the loss of a token:

        token-mean               Σ l / Σ n_i
        seq-mean-token-mean      (1/B) Σ_i (1/n_i) Σ_t l
        seq-mean-token-sum       (1/B) Σ_i Σ_t l
        seq-mean-token-sum-norm  Σ l / scale
        seq-mean-token-const     (1/B) Σ_i (1/scale) Σ_t l   (Dr. GRPO)

    Call it on the whole mini-batch: micro-batches then only add up.

    Args:
      loss_mask: tokens that are trained.
      mode: one of the five above.
      sequence_ids: arbitrary ids, equal ids = one sequence, -1 = padding (weight 0 in every mode); None makes
        every row a sequence.
      scale: divisor of ``seq-mean-token-sum-norm`` and ``seq-mean-token-const``; the row length when None.

    Returns:
      Weights [B, T], 0 off the mask; all 0 when nothing is trained. The default float type (float32 unless
      x64 is on), whatever the type of the mask.

    Raises:
      ValueError: for an unknown mode, a ``scale`` that the mode does not use, or different shapes.
    """
    check_choice("mode", mode, AGGREGATIONS)
    if scale is not None and mode not in SCALED_MODES:
        raise ValueError(
            f"scale is used by mode={' and '.join(map(repr, SCALED_MODES))} only, not by {mode!r}"
        )
    mask = as_mask(loss_mask)
    if sequence_ids is not None:
        check_shapes(loss_mask=loss_mask, sequence_ids=sequence_ids)
        mask = mask & (as_ids(sequence_ids) >= 0)
    # Only the modes that look at sequences pay for ranking their ids.
    segments = sequence_segments(mask, sequence_ids) if mode in SEQUENCE_MODES else None
    return _weigh(mask, segments, mode, scale)


def _weigh(
    mask: Bool[Array, "B T"], segments: Int[Array, "B T"] | None, mode: str, scale: Scalar | None
) -> Float[Array, "B T"]:
    """Compute `loss_weights` with sequences numbered in [0, B·T); ``segments`` is read under the mask."""
    dtype = jnp.result_type(float)
    ones = mask.astype(dtype)
    if mode == "token-mean":
        return ones / jnp.maximum(jnp.sum(ones), 1)
    constant = jnp.asarray(mask.shape[1] if scale is None else scale, dtype)
    if segments is None:
        return ones / constant
    home = jnp.maximum(segments, 0)
    counts = jax.ops.segment_sum(ones.ravel(), home.ravel(), num_segments=mask.size)
    weights = ones / jnp.maximum(jnp.sum(counts > 0, dtype=dtype), 1)
    if mode == "seq-mean-token-const":
        return weights / constant
    return weights if mode == "seq-mean-token-sum" else weights / jnp.maximum(counts[home], 1)


def minibatch_weights(
    loss_mask: Shaped[Arr, "B T"],
    minibatch_ids: Int[Arr, " B"],
    num_minibatches: int,
    *,
    mode: str,
    sequence_ids: Int[Arr, "B T"],
    scale: Scalar | None = None,
) -> Float[Array, "B T"]:
    """Compute loss weights of each mini-batch over itself alone; 0 on rows that are in none.

    Args:
      loss_mask: tokens that are trained.
      minibatch_ids: the mini-batch of each row in [0, num_minibatches); -1 = none.
      num_minibatches: static.
      mode: see `loss_weights`.
      sequence_ids: see `loss_weights`.
      scale: see `loss_weights`.

    Returns:
      Weights [B, T]; each mini-batch's are what `loss_weights` gives for its rows alone.
    """
    check_choice("mode", mode, AGGREGATIONS)
    mask = as_mask(loss_mask) & (as_ids(sequence_ids) >= 0)
    segments = sequence_segments(mask, sequence_ids) if mode in SEQUENCE_MODES else None
    total = jnp.zeros(mask.shape, jnp.result_type(float))
    for number in range(num_minibatches):
        rows = (as_ids(minibatch_ids) == number)[:, None]
        total = total + _weigh(mask & rows, segments, mode, scale)
    return total
