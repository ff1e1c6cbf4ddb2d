"""HGPO: groups of turns that share not only the observation but also what came before it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real, Shaped

from empg_jax.algorithms.anchors import anchor_groups
from empg_jax.algorithms.masking import Arr, Scalar, as_floats, as_ids, as_mask, check_shapes
from empg_jax.algorithms.segments import center_by_group, number_pairs


def history_groups(
    anchor_ids: Int[Array, "N K"], turn_mask: Bool[Array, "N K"], group_ids: Int[Array, " N"], history: int
) -> list[Int[Array, "N K"]]:
    """Number, for every length of history, the turns of a task group with equal last observations.

    Args:
      anchor_ids: arbitrary ids, equal ids = equal observation; -1 = none.
      turn_mask: turns that exist, in each row from the first column on.
      group_ids: in [0, N), -1 = absent.
      history: the longest history, in turns before the present one.

    Returns:
      ``history + 1`` tables of ids in [0, N·K); -1 where a turn has no such history.
    """
    nodes = anchor_groups(anchor_ids, turn_mask, group_ids)
    levels = [nodes]
    for length in range(1, history + 1):
        before = jnp.full_like(nodes, -1).at[:, length:].set(nodes[:, : max(nodes.shape[1] - length, 0)])
        levels.append(number_pairs(levels[-1], before))
    return levels


def hgpo(
    turn_returns: Real[Arr, "N K"],
    anchor_ids: Int[Arr, "N K"],
    turn_mask: Shaped[Arr, "N K"],
    group_ids: Int[Arr, " N"],
    *,
    history: int = 2,
    alpha: Scalar = 1.0,
    scale_by_std: bool = True,
    eps: Scalar = 1e-6,
    level_offset: Scalar = 2.0,
    drop_zeros: bool = True,
    base: Real[Arr, "N K"] | None = None,
) -> Float[Array, "N K"]:
    """Compute hierarchy-of-groups advantages (HGPO).

        a_k = (G − mean) / (std + eps) among the turns with equal last k + 1 observations, std with ddof 0
        A = Σ_k w_k a_k / (Σ_k w_k + eps),   w_k = (k + level_offset)^α,   k = 0 … history

    An equal observation after different turns is not the same decision, so a longer common history weighs
    more. A turn without a partner on a level skips it. Source: https://arxiv.org/abs/2602.22817; weights and
    skipping as in verl-agent, https://github.com/langfengQ/verl-agent (the paper has ``level_offset=1``).

    Args:
      turn_returns: G, discounted reward-to-go of each turn.
      anchor_ids: observation key of each turn; equal ids = equal observation, -1 = none.
      turn_mask: turns that exist, in each row from the first column on.
      group_ids: the task of each trajectory, in [0, N); -1 = absent.
      history: the longest history that is compared, in turns.
      alpha: α; 0 weighs all levels alike.
      scale_by_std: divide by the standard deviation of each group.
      eps: added to standard deviations and to the sum of weights.
      level_offset: what is added to a level in its weight.
      drop_zeros: a level where a turn gets exactly 0 does not count for it, though it has partners there.
      base: a further level of weight 1, such as the advantage of the episode; None = none.

    Returns:
      Advantages [N, K], 0 off the mask.

    Raises:
      ValueError: for a negative history or different shapes.
    """
    if history < 0:
        raise ValueError(f"history={history} must be at least 0")
    check_shapes(turn_returns=turn_returns, anchor_ids=anchor_ids, turn_mask=turn_mask)
    (values,) = as_floats(jax.lax.stop_gradient(turn_returns))
    ids = as_ids(group_ids)
    mask = as_mask(turn_mask) & (ids >= 0)[:, None]
    tiny, alpha = jnp.asarray(eps, values.dtype), jnp.asarray(alpha, values.dtype)
    total, weights = jnp.zeros_like(values), jnp.zeros_like(values)
    for level, members in enumerate(history_groups(as_ids(anchor_ids), mask, ids, history)):
        gain, std, count = (
            x.reshape(mask.shape) for x in center_by_group(values.ravel(), members.ravel(), values.size)
        )
        if scale_by_std:
            gain = gain / (std * jnp.sqrt(jnp.maximum(count - 1, 0) / jnp.maximum(count, 1)) + tiny)
        counts = gain != 0 if drop_zeros else count > 1
        weight = (level + jnp.asarray(level_offset, values.dtype)) ** alpha
        total, weights = total + weight * gain, weights + jnp.where(counts, weight, 0)
    if base is not None:
        check_shapes(base=base, turn_mask=turn_mask)
        part = jnp.where(mask, as_floats(jax.lax.stop_gradient(base))[0].astype(values.dtype), 0)
        total, weights = total + part, weights + jnp.where((part != 0) | (not drop_zeros), 1, 0)
    return jnp.where(mask, total / (weights + tiny), 0)
