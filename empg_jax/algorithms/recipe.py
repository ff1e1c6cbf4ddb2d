"""The plain numbers that distinguish one algorithm from another."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Bool, Float

from empg_jax.algorithms.advantages import SINGLETONS
from empg_jax.algorithms.aggregation import AGGREGATIONS
from empg_jax.algorithms.clipped import STALE_MODES
from empg_jax.algorithms.corrections import LEVELS
from empg_jax.algorithms.losses import KL_KINDS
from empg_jax.algorithms.masking import Scalar, check_choice
from empg_jax.algorithms.modulation import CENTERS, MEANS, SCOPES
from empg_jax.algorithms.objectives import OBJECTIVES
from empg_jax.types import Batch, Scores

MODULATIONS = ("none", "empg", "aem")
CORRECTIONS = ("none", "tis", "mis")
TurnEstimator = Callable[[Batch, Bool[Array, "N K"], Any], Float[Array, "N K"]]
TokenEstimator = Callable[[Batch, Scores, Any], Float[Array, "B T"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmpgSettings:
    """Keywords of `empg`; ``mixed_groups_only`` leaves out groups of equal returns (its ``active_mask``)."""

    k: Scalar = 1.0
    k_future: Scalar = 1.0
    zeta: Scalar = 0.1
    scope: str = "batch"
    center: str = "turn"
    whiten: bool = False
    mixed_groups_only: bool = False

    def __post_init__(self) -> None:
        check_choice("empg.scope", self.scope, SCOPES)
        check_choice("empg.center", self.center, CENTERS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AemSettings:
    """Keywords of `aem`; ``shuffle_seed`` seeds its ``shuffle_key``, folded with the batch's tokens."""

    lam: Scalar = 1.0
    scope: str = "group"
    min_range: Scalar = 0.1
    mean: str = "turn"
    center: str = "none"
    reverse: bool = False
    shuffle_seed: int | None = None

    def __post_init__(self) -> None:
        check_choice("aem.scope", self.scope, SCOPES)
        check_choice("aem.mean", self.mean, MEANS)
        check_choice("aem.center", self.center, ("turn", "none"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correction:
    """What is done about data that another policy sampled.

    Attributes:
      kind: ``tis`` multiplies the loss by `tis_weights`, ``mis`` rejects by `mis_mask`, ``none``.
      level: ``token``, ``sequence`` or ``sequence_mean``.
      cap: largest weight of ``tis``.
      low: smallest ratio that ``mis`` keeps.
      high: largest ratio that ``mis`` keeps.
      sequence_delta: δ of `offpolicy_sequence_mask`; None = off.
      stale_cap: cap of `decoupled_ppo`.
      stale_mode: mode of `decoupled_ppo`.
    """

    kind: str = "none"
    level: str = "token"
    cap: Scalar = 2.0
    low: Scalar = 0.5
    high: Scalar = 2.0
    sequence_delta: Scalar | None = None
    stale_cap: Scalar = 5.0
    stale_mode: str = "mask"

    def __post_init__(self) -> None:
        check_choice("correction.kind", self.kind, CORRECTIONS)
        check_choice("correction.level", self.level, LEVELS)
        check_choice("correction.stale_mode", self.stale_mode, STALE_MODES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticSettings:
    """How a critic is used and trained.

    Attributes:
      lam: λ of `gae`.
      value_coef: weight of the value loss beside the policy loss.
      value_clip: clip of `value_loss`; None = off.
    """

    lam: Scalar = 1.0
    value_coef: Scalar = 0.5
    value_clip: Scalar | None = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that distinguishes one algorithm from another.

    Attributes:
      estimator: ``(batch, turn_mask, recipe) -> float[N, K]``, base advantages of the turns.
      token_estimator: ``(batch, scores, recipe) -> float[B, T]`` instead, where they differ inside a turn.
      value_targets: ``(batch, scores, recipe) -> float[B, T]``, what the critic learns; None = no critic.
      critic: settings of the critic, where there is one.
      scale_by_std: divide by the group's standard deviation, where the estimator knows it.
      singleton: what a group of one gives: ``zero`` or ``raw``.
      omega: weight of GiGPO's step part.
      gamma: discount per token of REINFORCE++ and PPO.
      group_baseline: REINFORCE++ subtracts the group's mean return first.
      reward_kl_coef: weight of the k1 penalty inside the reward of REINFORCE++ and PPO.
      invalid_penalty: taken off for every action that the parser did not accept: off the turn's own score
        where the estimator has one, else off the episode's return (0 where the rewards already hold it).
      overlong_length: longest response of an episode in tokens, for `overlong_penalty`; None = off.
      overlong_cache: width of that penalty's ramp in tokens.
      modulation: ``none``, ``empg`` or ``aem``.
      empg: settings of EMPG.
      aem: settings of AEM.
      loss: a name in `OBJECTIVES`.
      loss_aggregation: a mode of `loss_weights`.
      loss_scale: divisor of ``seq-mean-token-sum-norm``; None = the row length.
      clip_low: lower clip; None = the objective's own default.
      clip_high: upper clip; None = the objective's own default.
      dual_clip: bound of ``ppo_clip`` for negative advantages; None = off.
      correction: what is done about data that another policy sampled.
      kl_coef: weight of the KL penalty in the loss.
      kl_kind: kind of `kl_penalty`.
      entropy_coef: weight of the entropy bonus.
    """

    estimator: TurnEstimator | None = None
    token_estimator: TokenEstimator | None = None
    value_targets: TokenEstimator | None = None
    critic: CriticSettings = CriticSettings()
    scale_by_std: bool = True
    singleton: str = "zero"
    omega: Scalar = 1.0
    gamma: Scalar = 1.0
    group_baseline: bool = False
    reward_kl_coef: Scalar = 0.0
    invalid_penalty: Scalar = 0.0
    overlong_length: int | None = None
    overlong_cache: int | None = None
    modulation: str = "none"
    empg: EmpgSettings = EmpgSettings()
    aem: AemSettings = AemSettings()
    loss: str = "ppo_clip"
    loss_aggregation: str = "token-mean"
    loss_scale: Scalar | None = None
    clip_low: Scalar | None = None
    clip_high: Scalar | None = None
    dual_clip: Scalar | None = 3.0
    correction: Correction = Correction()
    kl_coef: Scalar = 0.0
    kl_kind: str = "k3"
    entropy_coef: Scalar = 0.0

    def __post_init__(self) -> None:
        if (self.estimator is None) == (self.token_estimator is None):
            raise ValueError(
                "a recipe has one estimator: of turns (estimator) or of tokens (token_estimator)"
            )
        check_choice("singleton", self.singleton, SINGLETONS)
        check_choice("modulation", self.modulation, MODULATIONS)
        check_choice("loss", self.loss, tuple(OBJECTIVES))
        check_choice("loss_aggregation", self.loss_aggregation, AGGREGATIONS)
        check_choice("kl_kind", self.kl_kind, KL_KINDS)
        if (self.overlong_length is None) != (self.overlong_cache is None):
            raise ValueError("overlong_length and overlong_cache are set together or not at all")
        if self.kl_coef and self.reward_kl_coef:
            raise ValueError(
                "KL belongs in the loss (kl_coef) or in the reward (reward_kl_coef), not in both"
            )
        if self.loss == "decoupled_ppo" and self.correction.kind == "tis":
            raise ValueError(
                'loss="decoupled_ppo" already weighs by learner/sampler; correction.kind="tis" too?'
            )
