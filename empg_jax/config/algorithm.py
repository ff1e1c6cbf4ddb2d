"""The configuration of credit assignment and loss: the ``algorithm`` section and the sections inside it.

A name stands for the keys that distinguish it (`RECIPES`); a key that the named algorithm would not read is
refused, so that nothing is set in vain.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from empg_jax.errors import nearest

# Names that `algorithm.name` takes, and the keys that each sets; every other key keeps its default. Each name
# also exists with _empg or _aem behind it, which sets `algorithm.modulation`.
RECIPES: dict[str, dict[str, Any]] = {
    "reinforce": {"loss": "reinforce", "aggregation": "seq-mean-token-sum", "dual_clip": None},
    "rloo": {},
    "grpo": {},
    "dr_grpo": {"scale_by_std": False, "aggregation": "seq-mean-token-sum"},
    "grpo_turn_rows": {},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28},
    "gspo": {"loss": "gspo", "aggregation": "seq-mean-token-mean", "dual_clip": None},
    "cispo": {"loss": "cispo", "dual_clip": None},
    "sapo": {"loss": "sapo", "aggregation": "seq-mean-token-mean", "dual_clip": None},
    "gigpo": {"scale_by_std": False},
    "reinforce_pp": {"reward_kl_coef": 0.001},
    "reinforce_pp_baseline": {},
    "ppo": {},
}
ALGORITHM_NAMES = (*RECIPES, *(f"{name}_{kind}" for name in RECIPES for kind in ("empg", "aem")))
NO_GROUP_BASELINE = ("reinforce", "reinforce_pp", "ppo")  # the others compare the attempts of one task

# Keys that only some settings read: key -> (the key that decides, its values). Others keep the default.
_ACTS_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "omega": ("name", ("gigpo",)),
    "turn_gamma": ("name", ("gigpo",)),
    "gamma": ("name", ("reinforce_pp", "reinforce_pp_baseline", "ppo")),
    "reward_kl_coef": ("name", ("reinforce_pp", "reinforce_pp_baseline", "ppo")),
    "critic.lam": ("name", ("ppo",)),
    "critic.value_coef": ("name", ("ppo",)),
    "critic.value_clip": ("name", ("ppo",)),
    "loss_scale": ("aggregation", ("seq-mean-token-sum-norm",)),
    "correction.level": ("correction.kind", ("tis", "mis")),
    "correction.cap": ("correction.kind", ("tis",)),
    "correction.low": ("correction.kind", ("mis",)),
    "correction.high": ("correction.kind", ("mis",)),
    "correction.stale_cap": ("loss", ("decoupled_ppo",)),
    "correction.stale_mode": ("loss", ("decoupled_ppo",)),
}


class Section(BaseModel):
    """A group of keys: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class EmpgConfig(Section):
    """Entropy-Modulated Policy Gradients (arXiv 2509.09265)."""

    k: float = Field(1.0, ge=0, description="Strength of the self-calibrating gradient scaling.")
    k_future: float = Field(1.0, ge=0, description="Strength of the entropy term inside the clarity bonus.")
    zeta: float = Field(0.1, ge=0, description="Weight of the future-clarity bonus.")
    scope: Literal["batch", "group", "trajectory"] = Field(
        "batch", description="Turns over which entropies are normalised."
    )
    center: Literal["turn", "token", "none"] = Field(
        "turn", description="Mean that is taken off the modulated advantages."
    )
    whiten: bool = Field(False, description="Also divide them by their standard deviation.")
    mixed_groups_only: bool = Field(False, description="Leave out task groups whose returns are all equal.")


class AemConfig(Section):
    """Adaptive Entropy Modulation (arXiv 2605.00425)."""

    lam: float = Field(1.0, ge=0, description="Strength of the modulation.")
    scope: Literal["group", "batch", "trajectory"] = Field(
        "group", description="Turns over which entropies are normalised."
    )
    min_range: float = Field(0.1, ge=0, description="Entropy range (nats) below which nothing is modulated.")
    mean: Literal["turn", "token"] = Field("turn", description="What weighs one in the mean of the factors.")
    center: Literal["turn", "none"] = Field("none", description="Mean taken off the modulated advantages.")
    reverse: bool = Field(False, description="Control: swap the factors of low and high entropy.")
    shuffle_seed: int | None = Field(None, ge=0, description="Control: permute the factors with this seed.")


class CriticConfig(Section):
    """The critic of PPO: a value head on the policy's own network."""

    lam: float = Field(1.0, ge=0, le=1, description="λ of generalised advantage estimation.")
    value_coef: float = Field(0.5, ge=0, description="Weight of the value loss beside the policy loss.")
    value_clip: float | None = Field(
        0.5, gt=0, description="How far a value may move in an update; null is off."
    )


class CorrectionConfig(Section):
    """What is done about data that another policy sampled: the engine's rounding, or older weights."""

    kind: Literal["none", "tis", "mis"] = Field(
        "none", description="Truncated (tis) or masked (mis) importance sampling of sampler and learner."
    )
    level: Literal["token", "sequence", "sequence_mean"] = Field(
        "token", description="What the ratio is taken of; a sequence has a product or a geometric mean."
    )
    cap: float = Field(2.0, gt=0, description="Largest weight of tis.")
    low: float = Field(0.5, ge=0, description="Smallest ratio that mis keeps.")
    high: float = Field(2.0, gt=0, description="Largest ratio that mis keeps.")
    sequence_delta: float | None = Field(
        None,
        ge=0,
        description="Drop a sequence of negative advantage that moved further than this (nats); null is off.",
    )
    stale_cap: float = Field(5.0, gt=0, description="Largest weight of a token in decoupled_ppo.")
    stale_mode: Literal["mask", "clamp"] = Field(
        "mask", description="What decoupled_ppo does beyond that weight."
    )


class AlgorithmConfig(Section):
    """Credit assignment and loss."""

    name: str = Field("grpo", description="Algorithm by name; _empg or _aem behind it sets modulation.")
    modulation: Literal["none", "empg", "aem"] = Field(
        "none", description="Entropy modulation of the credit."
    )
    empg: EmpgConfig = Field(default_factory=EmpgConfig, description="Settings of EMPG.")
    aem: AemConfig = Field(default_factory=AemConfig, description="Settings of AEM.")
    omega: float = Field(1.0, ge=0, description="Weight of GiGPO's step part.")
    turn_gamma: float = Field(0.95, ge=0, le=1, description="Discount per turn of GiGPO's step returns.")
    gamma: float = Field(1.0, ge=0, le=1, description="Discount per sampled token (REINFORCE++, PPO).")
    critic: CriticConfig = Field(default_factory=CriticConfig, description="Settings of the critic.")
    overlong_length: int | None = Field(
        None, ge=1, description="Sampled tokens at which an episode's return is 1 lower (DAPO); null is off."
    )
    overlong_cache: int | None = Field(
        None, ge=1, description="Width in tokens of the ramp that leads to that penalty."
    )
    loss: Literal["ppo_clip", "gspo", "turn_ratio_clip", "cispo", "sapo", "reinforce", "decoupled_ppo"] = (
        Field("ppo_clip", description="Policy loss.")
    )
    aggregation: Literal[
        "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
    ] = Field("token-mean", description="How token losses become one number.")
    loss_scale: float | None = Field(
        None, gt=0, description="Divisor of seq-mean-token-sum-norm; null is the row length."
    )
    clip_low: float | None = Field(
        None,
        gt=0,
        description="Ratios are clipped at 1 - clip_low; null is the loss's own, 0.2 for ppo_clip.",
    )
    clip_high: float | None = Field(
        None,
        gt=0,
        description="Ratios are clipped at 1 + clip_high; null is the loss's own, 0.2 for ppo_clip.",
    )
    dual_clip: float | None = Field(
        3.0, gt=1, description="Bound of ppo_clip at negative advantages; null is off."
    )
    kl_coef: float = Field(0.0, ge=0, description="Weight of the KL penalty to the reference policy.")
    kl_kind: Literal["k1", "k2", "k3", "k1+", "k3+"] = Field(
        "k3", description="Estimator of that KL; + corrects its gradient."
    )
    reward_kl_coef: float = Field(
        0.0, ge=0, description="Weight of a KL penalty (k1) inside the reward, in place of kl_coef."
    )
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    scale_by_std: bool = Field(True, description="Divide group advantages by the group's standard deviation.")
    singleton: Literal["zero", "raw"] = Field("zero", description="Advantage of a group of one.")
    entropy_source: Literal["learner", "engine"] = Field(
        "learner", description="Who measures entropies: a score pass of the learner, or the sampler."
    )

    correction: CorrectionConfig = Field(
        default_factory=CorrectionConfig, description="Corrections for data that another policy sampled."
    )

    @model_validator(mode="before")
    @classmethod
    def _expand_recipe(cls, data: Any) -> Any:
        """Write out the keys that a name stands for; explicit keys win, but for a second modulation."""
        if not isinstance(data, dict) or not isinstance(data.get("name", "grpo"), str):
            return data
        name = data.get("name", "grpo")
        if name not in ALGORITHM_NAMES:
            hint = (
                nearest(name, ALGORITHM_NAMES) or f"; choose {' or '.join(RECIPES)}, also with _empg or _aem"
            )
            raise ValueError(f"algorithm.name={name} is unknown{hint}")
        base, _, kind = (name, "", "") if name in RECIPES else name.rpartition("_")
        explicit = data.get("modulation", kind)
        if kind and explicit != kind:
            raise ValueError(
                f"algorithm.name={name} and algorithm.modulation={explicit} name two modulations: use "
                f"algorithm.name={base} with algorithm.modulation={explicit}, or leave one out"
            )
        return {**RECIPES[base], **({"modulation": kind} if kind else {}), **data, "name": base}

    @model_validator(mode="after")
    def _check(self) -> AlgorithmConfig:
        problems = [*self._idle_keys(), *self._contradictions()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _idle_keys(self) -> Iterator[str]:
        for key, (decider, values) in _ACTS_WITH.items():
            (value, default), (choice, _) = self._lookup(key), self._lookup(decider)
            if choice not in values and value != default:
                yield (
                    f"algorithm.{key}={value} has no effect with algorithm.{decider}={choice}: it belongs to "
                    f"{' and '.join(values)}"
                )

    def _lookup(self, key: str) -> tuple[Any, Any]:
        """Value and default of a key of this section."""
        section: BaseModel = self
        *parents, last = key.split(".")
        for parent in parents:
            section = getattr(section, parent)
        return getattr(section, last), type(section).model_fields[last].default

    def _contradictions(self) -> Iterator[str]:
        correction = self.correction
        if self.kl_coef and self.reward_kl_coef:
            yield (
                f"algorithm.kl_coef={self.kl_coef} and algorithm.reward_kl_coef={self.reward_kl_coef} (set "
                "by reinforce_pp): KL belongs in the loss or in the reward, not in both; set one to 0"
            )
        if (self.overlong_length is None) != (self.overlong_cache is None):
            yield "algorithm.overlong_length and algorithm.overlong_cache are set together or not at all"
        elif self.overlong_length and self.overlong_cache and self.overlong_cache > self.overlong_length:
            yield (
                f"algorithm.overlong_cache={self.overlong_cache} must not exceed "
                f"algorithm.overlong_length={self.overlong_length}"
            )
        if correction.low > correction.high:
            yield (
                f"algorithm.correction.low={correction.low} must not exceed "
                f"algorithm.correction.high={correction.high}"
            )
        if correction.kind == "tis" and self.loss == "decoupled_ppo":
            yield (
                "algorithm.correction.kind=tis with algorithm.loss=decoupled_ppo: that loss has weights of "
                "its own; use algorithm.correction.kind=none"
            )
        if correction.kind != "none" and self.entropy_source == "engine":
            yield (
                f"algorithm.correction.kind={correction.kind} compares learner and sampler, but "
                "algorithm.entropy_source=engine takes the sampler's word for the learner's: use "
                "algorithm.entropy_source=learner"
            )
