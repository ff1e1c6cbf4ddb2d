"""The data that crosses between rooms.

Shape legend (one spelling everywhere)::

    B  rows given to the learner        N  trajectories in the batch
    T  tokens per row                   K  turns per trajectory (the configured maximum)
    V  vocabulary                       P, R  prompt and response tokens of one turn

Alignment, stated once: position ``t`` of every per-token stream talks about token ``t`` itself.
``logprobs[b, t]`` is the log-probability of ``tokens[b, t]`` given the tokens before it; the shift by
one happens in a single function (`empg_jax.learner.outputs.compute_outputs`).

Host data (``Turn``, ``Trajectory``, ``Outcome``) is NumPy; device data (``Batch``, ``Scores``,
``Credit``) are pytrees of arrays.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

import flax.struct
import numpy as np

Params = Any  # a nested dict of arrays
Leaf = Any  # an array (NumPy on the host, JAX on devices), or a shape or sharding that stands for one


class Status(enum.StrEnum):
    """What becomes of an episode. An infrastructure failure is never a reward of zero."""

    TRAINED = "trained"  # the policy caused what happened: learn from it
    SCORED_ZERO = "scored_zero"  # the policy broke a limit: learn from it as worth at most 0
    DISCARDED = "discarded"  # something else broke: never learned from, refilled


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """How an episode ended.

    Attributes:
      status: whether the episode is learned from.
      reason: a short name for the cause, for example ``won``, ``turn_limit``, ``context_limit``,
        ``env_error``, ``worker_died``, ``timeout``; counted in metrics and ``summary.json``.
      detail: free text for a person (an exception's message).
    """

    status: Status
    reason: str
    detail: str = ""

    @property
    def is_trained(self) -> bool:
        """True when the learner may see the episode."""
        return self.status is not Status.DISCARDED


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One agent response (the papers' "step"), exactly as the policy saw and sampled it.

    Attributes:
      prompt_tokens: int32[P], every token that the policy conditioned on, oldest first.
      response_tokens: int32[R], the sampled ids, end-of-turn token included when it was sampled.
      behavior_logprobs: float32[R], log-probabilities at the rollout temperature.
      entropies: float32[R], full-vocabulary entropies in nats at the rollout temperature.
      reward: the environment's own reward for this turn; no penalty of ours is inside.
      version: the policy version that sampled it.
      anchor: hash of the observation that the turn answers (GiGPO's state key).
      is_valid: whether the parser accepted the response as an action.
      finish_reason: ``stop`` (end-of-turn sampled) or ``length``.
      observation: text that the turn answers (for people; never tokenised again).
      response: decoded response text (for people; never tokenised again).
    """

    prompt_tokens: np.ndarray
    response_tokens: np.ndarray
    behavior_logprobs: np.ndarray
    entropies: np.ndarray
    reward: float
    version: int
    anchor: int
    is_valid: bool
    finish_reason: str
    observation: str = ""
    response: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One episode: its turns, and what is to be made of it.

    Attributes:
      task: index of the task in its panel.
      split: the panel's name (``train``, ``valid``, ``test``).
      group_id: run-wide number of the group of attempts; unique, never reused.
      member: which attempt of the group, in [0, group_size).
      turns: the turns in order; empty only for discarded episodes.
      outcome: trained, scored zero, or discarded.
      episode_return: plain sum of the turns' rewards, whatever the outcome; what breaking a limit costs
        is up to the algorithm.
      is_success: the environment's own verdict.
      terminated: ended by the task.
      truncated: ended by a limit.
      metrics: further scalars that the environment reported at the end.
    """

    task: int
    split: str
    group_id: int
    member: int
    turns: tuple[Turn, ...]
    outcome: Outcome
    episode_return: float
    is_success: bool
    terminated: bool
    truncated: bool
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def oldest_version(self) -> int:
        """The oldest policy version among the turns."""
        return min(turn.version for turn in self.turns)

    @property
    def num_tokens(self) -> int:
        """Sampled tokens over all turns."""
        return sum(len(turn.response_tokens) for turn in self.turns)


def _per(axis: str, dtype: Any, absent: int = 0) -> Any:
    """A field with one entry per ``axis``."""
    return flax.struct.field(metadata={"per": axis, "dtype": dtype, "absent": absent})


@flax.struct.dataclass
class Batch:
    """A global batch: packed token rows plus a table of trajectories.

    Each field says its axis (one entry per token ``[B T]``, row ``[B]``, trajectory ``[N]`` or turn
    ``[N K]``), its type, and the value where nothing is there (0 unless said). Host arrays (`empty_fields`)
    and shardings (`fields_per`) are made from this list.
    """

    tokens: Leaf = _per("token", np.int32)
    loss_mask: Leaf = _per("token", bool)  # sampled by the policy, hence trainable
    segment_ids: Leaf = _per("token", np.int32)  # packed sequence in the row, from 1; 0 = padding
    positions: Leaf = _per("token", np.int32)  # position inside the segment
    sequence_ids: Leaf = _per("token", np.int32, absent=-1)  # the segment, unique in the whole batch
    trajectory_ids: Leaf = _per("token", np.int32)  # in [0, N); read only under loss_mask
    turn_ids: Leaf = _per("token", np.int32)  # in [0, K); read only under loss_mask
    behavior_logprobs: Leaf = _per("token", np.float32)
    behavior_entropies: Leaf = _per("token", np.float32)
    minibatch_ids: Leaf = _per("row", np.int32, absent=-1)  # the optimizer step that a row belongs to
    returns: Leaf = _per("trajectory", np.float32)  # sum of the environment's rewards, no penalty inside
    group_ids: Leaf = _per("trajectory", np.int32, absent=-1)  # in [0, N)
    trajectory_mask: Leaf = _per("trajectory", bool)
    truncated: Leaf = _per("trajectory", bool)  # a limit ended the episode, not the task
    scored_zero: Leaf = _per("trajectory", bool)  # the policy broke a limit: the episode is worth at most 0
    turn_rewards: Leaf = _per("turn", np.float32)  # the environment's own reward of the turn
    turn_truncated: Leaf = _per("turn", bool)  # the token limit cut the response
    turn_valid: Leaf = _per("turn", bool)  # the parser accepted the turn's action
    anchor_ids: Leaf = _per("turn", np.int32, absent=-1)  # observation key, equal ids = equal observation
    versions: Leaf = _per("turn", np.int32)  # policy version that sampled the turn


BATCH_FIELDS: dict[str, str] = {field.name: field.metadata["per"] for field in dataclasses.fields(Batch)}


def fields_per(axis: str) -> list[str]:
    """Names of the batch's fields that have one entry per ``token``, ``row``, ``trajectory`` or ``turn``."""
    return [name for name, per in BATCH_FIELDS.items() if per == axis]


def empty_fields(**sizes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Host arrays of a batch in which nothing is present.

    Args:
      **sizes: shape by axis, for example ``token=(B, T)``; other axes are left out.
    """
    return {
        field.name: np.full(sizes[field.metadata["per"]], field.metadata["absent"], field.metadata["dtype"])
        for field in dataclasses.fields(Batch)
        if field.metadata["per"] in sizes
    }


@flax.struct.dataclass
class Scores:
    """What the learner says of a batch before it changes any weight (no gradients)."""

    old_logprobs: Leaf  # float32[B T]
    entropies: Leaf  # float32[B T]
    ref_logprobs: Leaf  # float32[B T]  equals old_logprobs when there is no KL term
    values: Leaf = None  # float32[B T]  of the state that a token was sampled in; None without a critic


@flax.struct.dataclass
class TurnCredit:
    """Credit as a table of turns ``[N K]``; where an estimator differs inside a turn, its mean."""

    entropies: Leaf  # float32[N K]   mean token entropy, in nats, that the modulation read
    base: Leaf  # float32[N K]        advantage of the estimator, before modulation
    factors: Leaf  # float32[N K]     what the modulation multiplied with; 1 without
    bonuses: Leaf  # float32[N K]     what the modulation added before centering; 0 without
    advantages: Leaf  # float32[N K]  after modulation and centering
    mask: Leaf  # bool[N K]           turns that exist


@flax.struct.dataclass
class Credit:
    """What a batch is worth, token by token. All constants to the gradient."""

    advantages: Leaf  # float32[B T]
    loss_weights: Leaf  # float32[B T]  share in its mini-batch's loss; zero off loss_mask
    metrics: dict[str, Leaf]  # scalars for the log
    turns: TurnCredit | None = None  # the same credit turn by turn
    value_targets: Leaf = None  # float32[B T]  what the critic is to say; None without a critic
