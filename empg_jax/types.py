"""The data types that the packages exchange.

Shape legend (one spelling everywhere)::

    B  rows given to the learner        N  trajectories in the batch
    T  tokens per row                   K  turns per trajectory (the configured maximum)
    V  vocabulary                       P, R  prompt and response tokens of one turn

Alignment, defined here for the whole package: entry ``t`` of every per-token stream describes token ``t``.
``logprobs[b, t]`` is the log-probability of ``tokens[b, t]`` given the tokens before it; the shift by
one happens in a single function (`empg_jax.learner.outputs.compute_outputs`).

Host data (``Turn``, ``Trajectory``, ``Outcome``) holds NumPy arrays; device data (``Batch``, ``Scores``,
``Credit``) are pytrees of arrays.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import numpy as np

Params = Any  # a nested dict of arrays
Leaf = Any  # an array (NumPy on the host, JAX on devices), or a shape or sharding that stands for one


class Status(enum.StrEnum):
    """The treatment of an episode in training. An infrastructure failure is never scored zero."""

    TRAINED = "trained"  # the policy caused the outcome: train on it
    SCORED_ZERO = "scored_zero"  # the policy exceeded a limit: train on it with a return of at most 0
    DISCARDED = "discarded"  # another cause: never trained on, sampled again


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """The end of an episode.

    Attributes:
      status: treatment of the episode in training.
      reason: a short name for the cause, for example ``won``, ``turn_limit``, ``context_limit``,
        ``env_error``, ``worker_died``, ``timeout``; counted in metrics and ``summary.json``.
      detail: free text for the user (an exception's message).
    """

    status: Status
    reason: str
    detail: str = ""

    @property
    def is_trained(self) -> bool:
        """True when the episode is trained on."""
        return self.status is not Status.DISCARDED


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One agent response (the papers' "step"), exactly as the policy saw and sampled it.

    Attributes:
      prompt_tokens: int32[P], every token that the policy conditioned on, oldest first.
      response_tokens: int32[R], the sampled ids, end-of-turn token included when it was sampled.
      behavior_logprobs: float32[R], log-probabilities in the distribution that the tokens were drawn from:
        at the rollout temperature, after top-k, top-p and min-p.
      entropies: float32[R], full-vocabulary entropies in nats at the rollout temperature (no filter).
      reward: the environment's reward for this turn, without the algorithm's penalties.
      version: the policy version that sampled it; the oldest where weights changed in its middle.
      anchor: hash of the observation that the turn answers (GiGPO's state key).
      is_valid: whether the parser accepted the response as an action.
      finish_reason: ``stop`` (end-of-turn sampled, or a stop string completed) or ``length``.
      observation: text that the turn answers (for display; never tokenized again).
      response: decoded response text (for display; never tokenized again).
      versions: int32[R], the policy version of every token, where they differ; else None.
      action: the action that the environment executed; None where it is not known.
      milestone: whether the turn reached a subgoal, by the environment's word.
      answer_logprob: mean log-probability of the known answer's tokens after the turn's prompt, under the
        policy before the update; None where it was not scored.
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
    versions: np.ndarray | None = None
    action: str | None = None
    milestone: bool = False
    answer_logprob: float | None = None


def share_prompts(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Make each prompt that a later one repeats a view of it: memory would grow with the square of turns."""
    shared, longest = [], np.zeros(0, np.int32)
    for turn in reversed(turns):
        length = len(turn.prompt_tokens)
        if np.array_equal(longest[:length], turn.prompt_tokens):
            turn = dataclasses.replace(turn, prompt_tokens=longest[:length])
        else:
            longest = turn.prompt_tokens
        shared.append(turn)
    return tuple(reversed(shared))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One episode: its turns and its outcome.

    Attributes:
      task: index of the task in its panel.
      split: the panel's name (``train``, ``valid``, ``test``).
      group_id: run-wide number of the group of attempts; unique, never reused.
      member: number of the attempt in its group, in [0, group_size).
      turns: the turns in order; empty only for discarded episodes.
      outcome: trained, scored zero, or discarded.
      episode_return: plain sum of the turns' rewards, whatever the outcome; the algorithm decides the cost of
        exceeding a limit.
      is_success: the environment's verdict.
      terminated: whether the task ended the episode.
      truncated: whether a limit ended the episode.
      metrics: further scalars that the environment reported at the end.
      group: the kind of the task in the environment's words, ``info["group"]``; empty where it names none.
      last_anchor: hash of the observation that the episode ended in, which no turn answers; None where it is
        not known.
      last_observation: its text (for display; never tokenized).
      answer: what leads to a known answer in a response, and the answer; None where none is known.
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
    group: str = ""
    last_anchor: int | None = None
    last_observation: str = ""
    answer: tuple[str, str] | None = None

    @property
    def oldest_version(self) -> int:
        """The oldest policy version among the turns."""
        return min(turn.version for turn in self.turns)

    @property
    def num_tokens(self) -> int:
        """Sampled tokens over all turns."""
        return sum(len(turn.response_tokens) for turn in self.turns)


def _per(axis: str, dtype: Any, absent: int = 0) -> Any:
    """Declare a field with one entry per ``axis``."""
    return flax.struct.field(metadata={"per": axis, "dtype": dtype, "absent": absent})


@flax.struct.dataclass
class Batch:
    """A global batch: packed token rows plus a table of trajectories.

    Each field declares its axis (one entry per token ``[B T]``, row ``[B]``, trajectory ``[N]`` or turn
    ``[N K]``), its type, and the value of absent entries (default 0). Host arrays (`empty_fields`) and
    shardings (`fields_per`) are made from these declarations.
    """

    tokens: Leaf = _per("token", np.int32)
    loss_mask: Leaf = _per("token", bool)  # sampled by the policy, hence trainable
    segment_ids: Leaf = _per("token", np.int32)  # packed sequence in the row, from 1; 0 = padding
    positions: Leaf = _per("token", np.int32)  # position inside the segment
    # The earlier segment of the row that its own one continues (`learner.sharing`); -1: it begins by itself.
    trunk_ids: Leaf = _per("token", np.int32, absent=-1)
    # The segment, unique in the whole batch; -1 at padding and trunks, which hold no sampled token.
    sequence_ids: Leaf = _per("token", np.int32, absent=-1)
    trajectory_ids: Leaf = _per("token", np.int32)  # in [0, N); read only under loss_mask
    turn_ids: Leaf = _per("token", np.int32)  # in [0, K); read only under loss_mask
    behavior_logprobs: Leaf = _per("token", np.float32)
    behavior_entropies: Leaf = _per("token", np.float32)
    minibatch_ids: Leaf = _per("row", np.int32, absent=-1)  # the optimizer step that a row belongs to
    returns: Leaf = _per("trajectory", np.float32)  # sum of the environment's rewards, without penalties
    group_ids: Leaf = _per("trajectory", np.int32, absent=-1)  # in [0, N)
    trajectory_mask: Leaf = _per("trajectory", bool)
    success: Leaf = _per("trajectory", bool)  # the environment's verdict
    truncated: Leaf = _per("trajectory", bool)  # a limit ended the episode, not the task
    scored_zero: Leaf = _per("trajectory", bool)  # a limit was exceeded: the algorithm caps the return at 0
    # Key of the observation that the episode ended in, among the `anchor_ids`; -1: unknown.
    last_anchor_ids: Leaf = _per("trajectory", np.int32, absent=-1)
    turn_rewards: Leaf = _per("turn", np.float32)  # the environment's own reward of the turn
    turn_truncated: Leaf = _per("turn", bool)  # the token limit cut the response
    turn_valid: Leaf = _per("turn", bool)  # the parser accepted the turn's action
    anchor_ids: Leaf = _per("turn", np.int32, absent=-1)  # observation key, equal ids = equal observation
    action_ids: Leaf = _per(
        "turn", np.int32, absent=-1
    )  # executed action, equal ids = equal action; -1: unknown
    milestones: Leaf = _per("turn", bool)  # the environment verified a subgoal that the turn reached
    answer_logprobs: Leaf = _per("turn", np.float32)  # of the known answer after the turn's prompt
    versions: Leaf = _per("turn", np.int32)  # policy version that sampled the turn


BATCH_FIELDS: dict[str, str] = {field.name: field.metadata["per"] for field in dataclasses.fields(Batch)}


def fields_per(axis: str) -> list[str]:
    """List the batch's fields with one entry per ``token``, ``row``, ``trajectory`` or ``turn``."""
    return [name for name, per in BATCH_FIELDS.items() if per == axis]


def empty_fields(**sizes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Make the host arrays of an empty batch.

    Args:
      **sizes: shape by axis, for example ``token=(B, T)``; fields of other axes are left out.
    """
    return {
        field.name: np.full(sizes[field.metadata["per"]], field.metadata["absent"], field.metadata["dtype"])
        for field in dataclasses.fields(Batch)
        if field.metadata["per"] in sizes
    }


@flax.struct.dataclass
class Scores:
    """Per-token scores of a batch under the weights before the update (no gradients)."""

    old_logprobs: Leaf  # float32[B T]
    entropies: Leaf  # float32[B T]
    ref_logprobs: Leaf = (
        None  # float32[B T]  of the frozen reference; None unless a part of the recipe needs it
    )
    values: Leaf = None  # float32[B T]  value of the state that a token was sampled in; None without a critic
    clip_scale: Leaf = None  # float32[B T]  the credit's, for the loss; None = 1 everywhere


@flax.struct.dataclass
class TurnCredit:
    """Credit as a table of turns ``[N K]``; the mean over tokens where an estimator differs inside a turn."""

    entropies: Leaf  # float32[N K]   mean token entropy in nats, the modulation's input
    base: Leaf  # float32[N K]        advantage of the estimator, before modulation
    factors: Leaf  # float32[N K]     multiplicative factor of the modulation; 1 without modulation
    bonuses: Leaf  # float32[N K]     additive bonus of the modulation, before centering; 0 without modulation
    advantages: Leaf  # float32[N K]  those of the loss: modulated, whitened, divided by a mean weight
    mask: Leaf  # bool[N K]           turns that exist


@flax.struct.dataclass
class Credit:
    """Per-token credit of a batch. The gradient treats all of it as constant."""

    advantages: Leaf  # float32[B T]
    loss_weights: Leaf  # float32[B T]  share in its mini-batch's loss; zero off loss_mask
    metrics: dict[str, Leaf]  # scalars for the log
    turns: TurnCredit | None = None  # the same credit turn by turn
    value_targets: Leaf = None  # float32[B T]  regression targets of the critic; None without a critic
    clip_scale: Leaf = (
        None  # float32[B T]  what the objective's clip range is multiplied by; None = 1 everywhere
    )


def wide_type(dtype: Any) -> Any:
    """Return the type in which numbers of a type are added up: float32, or float64 for float64."""
    return np.float64 if dtype == np.float64 else np.float32
