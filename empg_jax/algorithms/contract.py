"""The protocols of a recipe's parts, one for each kind, and the data types that parts read and return.

A part is a pure function on the whole batch (``credit`` side) or on any rows of it (``loss`` side). Shapes
are those of `empg_jax.types`. Every custom function that follows a protocol is a part.
"""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float

from empg_jax.algorithms.kernel import Modulation as Modulation
from empg_jax.types import Batch, Scores

LossResult = tuple[Float[Array, "B T"], dict[str, Float[Array, "B T"]]]


class Turns(NamedTuple):
    """The batch as a table of turns. Absent trajectories have no turn."""

    entropies: Float[Array, "N K"]
    mask: Bool[Array, "N K"]
    token_counts: Float[Array, "N K"]


class Penalties(NamedTuple):
    """The amounts that a penalty subtracts, as positive numbers, for single turns and for whole episodes."""

    turns: Float[Array, "N K"]
    episodes: Float[Array, " N"]


class Worth(NamedTuple):
    """The returns and rewards after the penalties and the rule about exceeded limits.

    Attributes:
      returns: the episode's return, every penalty taken off; at most 0 where the policy broke a limit.
      turn_scores: the episode's return less the penalty of the turn's own action alone (`grpo_turn_rows`).
      turn_rewards: the reward of the turn; penalties of whole episodes are in the last turn, those of single
        turns are not inside.
      turn_penalties: penalty of the turn's own action. ``turn_rewards - turn_penalties`` sums to ``returns``.
      mask: turns that exist.
    """

    returns: Float[Array, " N"]
    turn_scores: Float[Array, "N K"]
    turn_rewards: Float[Array, "N K"]
    turn_penalties: Float[Array, "N K"]
    mask: Bool[Array, "N K"]


class TokenCredit(NamedTuple):
    """Advantages that differ inside a turn, the targets of a critic, and the factor of the clip range.

    ``is_whitened`` asks for mean 0 and variance 1 over the tokens of the batch, after the modulation. Without
    ``clip_scale`` the range is the objective's own; an estimator that gives it is a `Part` that says so
    (``scales_clip``).
    """

    advantages: Float[Array, "B T"]
    value_targets: Float[Array, "B T"] | None = None
    is_whitened: bool = False
    clip_scale: Float[Array, "B T"] | None = None


@runtime_checkable
class Penalise(Protocol):
    """``(batch, turns) -> Penalties``. Reads raw rewards, validity and lengths."""

    def __call__(self, batch: Batch, turns: Turns, /) -> Penalties:
        """Compute the penalties."""


@runtime_checkable
class Estimate(Protocol):
    """``(batch, scores, worth) -> float[N K]``, or a `TokenCredit` where advantages differ inside a turn.

    Reads ``worth`` for rewards; of the batch, ids and masks (``group_ids`` is -1 where a trajectory is
    absent).
    """

    def __call__(self, batch: Batch, scores: Scores, worth: Worth, /) -> Float[Array, "N K"] | TokenCredit:
        """Compute base advantages."""


@runtime_checkable
class Modulate(Protocol):
    """``(base, turns, batch) -> Modulation``. Reads turn entropies; of the batch, ids and raw returns."""

    def __call__(self, base: Float[Array, "N K"], turns: Turns, batch: Batch, /) -> Modulation:
        """Modulate the turns' advantages."""


@runtime_checkable
class Keep(Protocol):
    """``(batch, turns) -> bool[N K]``: the turns whose tokens the loss covers."""

    def __call__(self, batch: Batch, turns: Turns, /) -> Bool[Array, "N K"]:
        """Choose the turns to train on."""


@runtime_checkable
class Accept(Protocol):
    """``(batch, scores) -> bool[B T]``: the sampled tokens that stay in the loss and in its denominator."""

    def __call__(self, batch: Batch, scores: Scores, /) -> Bool[Array, "B T"]:
        """Choose tokens."""


@runtime_checkable
class Weigh(Protocol):
    """``(logprobs, rows, scores, advantages) -> float[B T]``: constants that multiply the policy loss."""

    def __call__(
        self,
        logprobs: Float[Array, "B T"],
        rows: Batch,
        scores: Scores,
        advantages: Float[Array, "B T"],
        /,
    ) -> Float[Array, "B T"]:
        """Weigh tokens."""


@runtime_checkable
class Limit(Protocol):
    """``(entropies, rows, scores) -> bool[B T]``: tokens whose policy loss keeps its gradient."""

    def __call__(self, entropies: Float[Array, "B T"], rows: Batch, scores: Scores, /) -> Bool[Array, "B T"]:
        """Choose tokens."""


@runtime_checkable
class MeanWeight(Protocol):
    """``(batch, scores) -> float[]``: the divisor of the weights, over the whole batch."""

    def __call__(self, batch: Batch, scores: Scores, /) -> Float[Array, ""]:
        """Compute the mean weight."""


@runtime_checkable
class Objective(Protocol):
    """``(logprobs, rows, scores, advantages) -> (loss, metrics)``, all per token.

    Gradients flow through ``logprobs`` alone. It sees any rows of the batch, so a statistic may not reach
    beyond a row.
    """

    def __call__(
        self,
        logprobs: Float[Array, "B T"],
        rows: Batch,
        scores: Scores,
        advantages: Float[Array, "B T"],
        /,
    ) -> LossResult:
        """Compute the policy's loss."""


@runtime_checkable
class Aggregate(Protocol):
    """``(batch, kept, num_minibatches) -> float[B T]``: each token's share in the loss of its mini-batch."""

    def __call__(
        self, batch: Batch, kept: Bool[Array, "B T"], num_minibatches: int, /
    ) -> Float[Array, "B T"]:
        """Compute loss weights."""


@runtime_checkable
class Penalty(Protocol):
    """``(logprobs, rows, scores) -> (kl, weight)``: a divergence per token and its weight in the loss."""

    def __call__(
        self, logprobs: Float[Array, "B T"], rows: Batch, scores: Scores, /
    ) -> tuple[Float[Array, "B T"], Float[Array, ""]]:
        """Compute the penalty."""


@runtime_checkable
class CriticLoss(Protocol):
    """``(values, old_values, targets) -> (loss, weight)``: the critic's loss per token and its weight."""

    def __call__(
        self,
        values: Float[Array, "B T"],
        old_values: Float[Array, "B T"],
        targets: Float[Array, "B T"],
        /,
    ) -> tuple[Float[Array, "B T"], Float[Array, ""]]:
        """Compute the critic's loss."""
