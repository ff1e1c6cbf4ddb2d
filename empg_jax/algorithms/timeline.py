"""Functions along the time of a trajectory, independent of the packing of its turns."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from empg_jax.algorithms.masking import Scalar
from empg_jax.algorithms.returns import discounted_returns


class Line(NamedTuple):
    """The sampled tokens of a batch in one row ``[1, B·T]``, sorted by trajectory.

    Functions along time run on this row and never cross to another trajectory of the same packed row. Lengths
    need not be known in advance.
    """

    order: Int[Array, " M"]
    mask: Bool[Array, "1 M"]
    ends: Bool[Array, "1 M"]

    def gather(self, values: Float[Array, "B T"]) -> Float[Array, "1 M"]:
        """Put tokens into a line."""
        return values.ravel()[self.order][None]

    def scatter(self, line: Float[Array, "1 M"], slots: Int[Array, "B T"]) -> Float[Array, "B T"]:
        """Put a line back to its tokens; 0 elsewhere."""
        back = jnp.zeros_like(line[0]).at[self.order].set(line[0]).reshape(slots.shape)
        return jnp.where(slots >= 0, back, 0)


def make_line(slots: Int[Array, "B T"], num_turns: int) -> Line:
    """Sort tokens by (trajectory, turn, position).

    Args:
      slots: ``trajectory · K + turn`` of each sampled token, -1 elsewhere (a turn lies in one row).
      num_turns: K.
    """
    flat = slots.ravel()
    order = jnp.argsort(jnp.where(flat >= 0, flat, jnp.iinfo(jnp.int32).max), stable=True)
    mask = (flat >= 0)[order]
    trajectory = jnp.where(mask, flat[order] // num_turns, -1)
    ends = (trajectory != jnp.roll(trajectory, -1)).at[-1].set(True)
    return Line(order, mask[None], (ends & mask)[None])


def token_reward_to_go(
    rewards: Float[Array, "B T"], slots: Int[Array, "B T"], num_turns: int, gamma: Scalar
) -> Float[Array, "B T"]:
    """Sum discounted rewards from every sampled token on along its trajectory, wherever its rows are packed.

    Args:
      rewards: per token; read under the slots only.
      slots: as in `make_line`.
      num_turns: K.
      gamma: discount per sampled token.
    """
    line = make_line(slots, num_turns)
    sums = discounted_returns(line.gather(rewards), line.mask, gamma=gamma, ends=line.ends)
    return line.scatter(sums, slots)


def place_turn_values(values: Float[Array, "N K"], slots: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Put each turn's value on the turn's last sampled token; 0 elsewhere.

    Args:
      values: one value per turn.
      slots: as in `make_line`.
    """
    place = jnp.arange(slots.size, dtype=jnp.int32).reshape(slots.shape)
    home = jnp.maximum(slots, 0)
    last = jnp.full(values.size, -1, jnp.int32).at[home].max(jnp.where(slots >= 0, place, -1))
    return jnp.where((slots >= 0) & (place == last[home]), values.ravel()[home], 0)


def last_turns(turn_mask: Bool[Array, "N K"]) -> Bool[Array, "N K"]:
    """Mark the last turn of each trajectory."""
    places = jnp.arange(turn_mask.shape[1], dtype=jnp.int32)[None, :]
    last = jnp.max(jnp.where(turn_mask, places, -1), axis=1, keepdims=True)
    return turn_mask & (places == last)
