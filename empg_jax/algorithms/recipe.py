"""A recipe: the parts that make one algorithm."""

import dataclasses
from collections.abc import Callable
from typing import Any

from empg_jax.algorithms import parts
from empg_jax.algorithms.contract import (
    Aggregate,
    CriticLoss,
    Estimate,
    Keep,
    Modulate,
    Objective,
    Penalise,
    Penalty,
)
from empg_jax.algorithms.masking import Scalar, check_choice
from empg_jax.algorithms.part import Correction, Part, name_of

AGGREGATES: dict[str, Callable[..., Part]] = {
    "token-mean": parts.token_mean,
    "seq-mean-token-mean": parts.seq_mean_token_mean,
    "seq-mean-token-sum": parts.seq_mean_token_sum,
    "seq-mean-token-sum-norm": parts.seq_mean_token_sum_norm,
    "seq-mean-token-const": parts.seq_mean_token_const,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that distinguishes one algorithm from another: bound pure functions, composed.

    ``Recipe(estimate=parts.gigpo(omega=1.0), modulate=parts.empg(zeta=0.05))``; a function of your own that
    keeps the protocol (`empg_jax.algorithms.contract`) may stand in any place.

    Attributes:
      estimate: base advantages.
      penalise: penalties subtracted from rewards before that; one part or several.
      modulate: modulation of turns by entropy; None = no modulation.
      objective: the policy's loss per token.
      correct: corrections for tokens that another policy sampled; one or several; None = on-policy.
      keep: turns that the loss covers; one part or several.
      aggregate: the share of each token in the loss: a mode of `loss_weights`, or a part.
      kl: penalty on the divergence from the frozen reference; None = no penalty.
      entropy_coef: weight of the entropy bonus.
      critic: the critic's loss, for an estimator that gives value targets.
    """

    estimate: Estimate
    penalise: Penalise | tuple[Penalise, ...] = ()
    modulate: Modulate | None = None
    objective: Objective = dataclasses.field(default_factory=parts.ppo_clip)
    correct: Correction | tuple[Correction, ...] | None = None
    keep: Keep | tuple[Keep, ...] = ()
    aggregate: Aggregate | str = "token-mean"
    kl: Penalty | None = None
    entropy_coef: Scalar = 0.0
    critic: CriticLoss | None = None

    def __post_init__(self) -> None:
        if isinstance(self.aggregate, str):
            check_choice("aggregation", self.aggregate, tuple(AGGREGATES))
            object.__setattr__(self, "aggregate", AGGREGATES[self.aggregate]())
        for name in ("penalise", "correct", "keep"):
            value = getattr(self, name)
            several = value if isinstance(value, tuple) else () if value is None else (value,)
            object.__setattr__(self, name, several)
        for name in ("estimate", "modulate", "objective", "aggregate", "kl", "critic"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ValueError(f"{name}={value!r} must be a function: a part, or one of your own")
        for item in self.correct:  # type: ignore[union-attr]
            if not isinstance(item, Correction):
                raise ValueError(f"correct={item!r} must be a Correction, as parts.tis() gives")
        _check_together(self)

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen reference policy is scored beside the policy."""
        return self.kl is not None or "ref_logprobs" in self.needs

    @property
    def needs_answers(self) -> bool:
        """Whether the known answer is scored after every prompt."""
        return "answer_logprobs" in self.needs

    @property
    def needs(self) -> frozenset[str]:
        """What the parts together read beyond the policy's own scores (`Part.needs`)."""
        one = (self.estimate, self.modulate, self.objective, self.aggregate, self.kl, self.critic)
        several: Any = (*self.penalise, *self.correct, *self.keep)  # type: ignore[misc]
        return frozenset(name for part in (*one, *several) for name in needs_of(part))


def needs_of(part: Any) -> tuple[str, ...]:
    """List what a part says it reads beyond the policy's own scores."""
    return getattr(part, "needs", ())


def compares_states(estimate: Any) -> bool:
    """Return whether an estimator compares the states that turns begin in, as far as it says so."""
    return "anchor_similarity" in getattr(estimate, "options", {})


def _check_together(recipe: Recipe) -> None:
    """Refuse parts that do the same thing twice, or that miss one another."""
    corrections = [name_of(item) for item in recipe.correct]  # type: ignore[union-attr]
    if recipe.kl is not None and "ref_logprobs" in needs_of(recipe.estimate):
        raise ValueError(
            "KL belongs in the loss (kl_coef) or in the reward (reward_kl_coef), not in both; set one to 0"
        )
    if name_of(recipe.objective) == "decoupled_ppo" and "tis" in corrections:
        raise ValueError('loss="decoupled_ppo" already weighs by learner/sampler; correction.kind="tis" too?')
    if "values" in needs_of(recipe.estimate) and recipe.critic is None:
        raise ValueError(f"{name_of(recipe.estimate)} needs a critic: set critic=parts.critic()")
    if getattr(recipe.estimate, "scales_clip", False):
        check_clips(recipe)


def check_clips(recipe: Recipe) -> None:
    """Refuse an objective of ours that reads no clip range, beside an estimator that gives one."""
    options = getattr(recipe.objective, "options", {"clip_low": None})  # one's own may read scores.clip_scale
    if "clip_low" not in options:
        raise ValueError(
            f"{name_of(recipe.estimate)} gives every turn a clip range, and {name_of(recipe.objective)} clips"
            " no ratio; turn_ratio_clip does"
        )
