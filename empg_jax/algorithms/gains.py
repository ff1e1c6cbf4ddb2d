"""Information gain: a turn is worth what it adds to the policy's probability of the known answer.

For each turn the answer's tokens are appended to the transcript as far as that turn, and scored (teacher
forcing, no gradient; `empg_jax.learner.answers`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real, Shaped

from empg_jax.algorithms.masking import Arr, Scalar, as_floats, as_ids, as_mask, check_choice, check_shapes
from empg_jax.algorithms.returns import backward_sums
from empg_jax.algorithms.segments import center_by_group
from empg_jax.algorithms.timeline import last_turns

GAIN_KINDS = ("prob", "logprob")
GAIN_STATISTICS = ("joint", "separate")


def information_gains(
    answer_logprobs: Real[Arr, "N L"], turn_mask: Shaped[Arr, "N K"], *, kind: str = "prob"
) -> Float[Array, "N K"]:
    """Compute what each turn but the last adds to the probability of the answer.

        g_t = p_t − p_{t−1},   p = exp(mean log-prob of the answer's tokens)

    Source: IGPO, https://arxiv.org/abs/2510.14967.

    Args:
      answer_logprobs: mean log-probability of the known answer's tokens: column 0 after the prompt, column
        ``t + 1`` after turn t (its observation included). L is K + 1. What stands after a last turn is not
        read.
      turn_mask: turns that exist, in each row from the first column on.
      kind: difference of ``"prob"`` or of ``"logprob"``.

    Returns:
      [N, K], 0 at last turns and off the mask.

    Raises:
      ValueError: for an unknown kind, or where there is not one column more than turns.
    """
    check_choice("kind", kind, GAIN_KINDS)
    if answer_logprobs.shape != (turn_mask.shape[0], turn_mask.shape[1] + 1):
        raise ValueError(
            f"answer_logprobs {tuple(answer_logprobs.shape)} must have a row for each trajectory, and a "
            f"column more than turn_mask {tuple(turn_mask.shape)}"
        )
    (scores,) = as_floats(jax.lax.stop_gradient(answer_logprobs))
    mask = as_mask(turn_mask)
    gaining = mask & ~last_turns(mask)
    levels = jnp.exp(scores) if kind == "prob" else scores
    return jnp.where(gaining, levels[:, 1:] - levels[:, :-1], 0)


def _standardized(values: Float[Array, "N K"], members: Int[Array, "N K"], size: int) -> Float[Array, "N K"]:
    """Compute (x − mean) / (sqrt(var + 1e-8) + 1e-6), var with ddof 0, among members of one id."""
    flat = center_by_group(values.ravel(), members.ravel(), size)
    gain, std, count = (x.reshape(values.shape) for x in flat)
    variance = std**2 * (jnp.maximum(count - 1, 0) / jnp.maximum(count, 1))
    return gain / jnp.where(count == 1, 1, jnp.sqrt(variance + 1e-8) + 1e-6)


def _places(
    outcomes: Real[Arr, " N"], turn_mask: Shaped[Arr, "N K"], group_ids: Int[Arr, " N"]
) -> tuple[Bool[Array, "N K"], Bool[Array, "N K"], Int[Array, "N K"]]:
    """Find the turns that exist, the last ones, and the task of each turn."""
    check_shapes(outcomes=outcomes, group_ids=group_ids)
    ids = as_ids(group_ids)
    mask = as_mask(turn_mask) & (ids >= 0)[:, None]
    return mask, last_turns(mask), jnp.where(mask, ids[:, None], -1)


def igpo(
    answer_logprobs: Real[Arr, "N L"],
    outcomes: Real[Arr, " N"],
    turn_mask: Shaped[Arr, "N K"],
    group_ids: Int[Arr, " N"],
    *,
    gamma: Scalar = 1.0,
    normalize: str = "joint",
    kind: str = "prob",
) -> Float[Array, "N K"]:
    """Compute information-gain advantages (IGPO).

        x_t: the gain of the turn, at the last turn the outcome, normalized among the attempts at the task
        A_t = x_t + γ A_{t+1}

    Source: https://arxiv.org/abs/2510.14967.

    Args:
      answer_logprobs: as in `information_gains`.
      outcomes: the outcome of each episode, for example F1 of the answer.
      turn_mask: turns that exist, in each row from the first column on.
      group_ids: the task of each trajectory, in [0, N); -1 = absent.
      gamma: γ, discount per turn.
      normalize: gains and outcomes of a task ``"joint"`` or ``"separate"``.
      kind: as in `information_gains`.

    Returns:
      Advantages [N, K], 0 off the mask.

    Raises:
      ValueError: for an unknown choice or different shapes.
    """
    check_choice("normalize", normalize, GAIN_STATISTICS)
    mask, ends, tasks = _places(outcomes, turn_mask, group_ids)
    gains = information_gains(answer_logprobs, mask, kind=kind)
    (outcomes,) = as_floats(jax.lax.stop_gradient(outcomes))
    dtype = jnp.promote_types(gains.dtype, outcomes.dtype)
    values = jnp.where(ends, outcomes.astype(dtype)[:, None], gains.astype(dtype))
    members = tasks if normalize == "joint" else jnp.where(mask, 2 * tasks + ends.astype(jnp.int32), -1)
    found = _standardized(values, members, 2 * tasks.shape[0])
    decays = jnp.where(mask, jnp.asarray(gamma, dtype), 1)
    return jnp.where(mask, backward_sums(jnp.where(mask, found, 0), decays), 0)


def a2tgpo(
    gains: Real[Arr, "N K"],
    outcomes: Real[Arr, " N"],
    turn_mask: Shaped[Arr, "N K"],
    group_ids: Int[Arr, " N"],
    *,
    alpha: Scalar = 0.3,
    gamma: Scalar = 1.0,
    clip_range: Scalar = 0.3,
) -> tuple[Float[Array, "N K"], Float[Array, "N K"]]:
    """Compute information-gain advantages compared at equal depth, and clip ranges that follow the gain.

        z_t: gain normalized among the task's turns of the same index;   o: outcome normalized in the task
        A_t = α Σ_{j≥t} γ^(j−t) z_j / sqrt(n − t) + o  (n gains),   at the last turn o
        c_t = 1 + clip_range (2 sigmoid(z_t) − 1), at the last turn 1;   clip to [1 − lo c_t, 1 + hi c_t]

    Source: A2TGPO, https://arxiv.org/abs/2605.06200.

    Args:
      gains: of each turn but the last (`information_gains`).
      outcomes: the outcome of each episode.
      turn_mask: turns that exist, in each row from the first column on.
      group_ids: the task of each trajectory, in [0, N); -1 = absent.
      alpha: α, weight of the gains.
      gamma: γ, discount per turn.
      clip_range: largest change of the clip range.

    Returns:
      ``(advantages, clip_scale)``, each [N, K], 0 off the mask.

    Raises:
      ValueError: for different shapes.
    """
    check_shapes(gains=gains, turn_mask=turn_mask)
    mask, ends, tasks = _places(outcomes, turn_mask, group_ids)
    gains, outcomes = as_floats(jax.lax.stop_gradient(gains), jax.lax.stop_gradient(outcomes))
    dtype, length = gains.dtype, mask.shape[1]
    gaining, columns = mask & ~ends, jnp.arange(length, dtype=jnp.int32)[None, :]
    members = jnp.where(gaining, tasks * length + columns, -1)
    found = jnp.where(gaining, _standardized(gains, members, mask.size), 0)
    outcome = _standardized(
        jnp.broadcast_to(outcomes[:, None], mask.shape), jnp.where(ends, tasks, -1), mask.shape[0]
    )
    own = jnp.sum(jnp.where(ends, outcome, 0), axis=1, keepdims=True)
    sums = backward_sums(found, jnp.where(mask, jnp.asarray(gamma, dtype), 1))
    left = jnp.cumsum(gaining[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1].astype(dtype)
    part = jnp.asarray(alpha, dtype) * sums / jnp.sqrt(jnp.maximum(left, 1))
    change = jnp.asarray(clip_range, dtype) * (2 * jax.nn.sigmoid(found) - 1)
    advantages = jnp.where(mask, jnp.where(gaining, part, 0) + own, 0)
    return advantages, jnp.where(mask, 1 + jnp.where(gaining, change, 0), 0)
