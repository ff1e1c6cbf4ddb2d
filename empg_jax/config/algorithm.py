"""The configuration of credit assignment and loss: the ``algorithm`` section and the sections inside it.

Its keys are the keywords of the factories in `empg_jax.algorithms.parts`. Each key takes its type, default
and description from the keyword (`empg_jax.algorithms.signatures`, which loads no JAX). A name stands for a
recipe. A key that no part of the chosen recipe reads is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from empg_jax.algorithms.keys import (
    MODULATIONS,
    NOT_OF_PARTS,
    OBJECTIVE_NAMES,
    OFF,
    SELECTORS,
    Spec,
    all_keys,
    choose,
    flatten,
    named_spec,
    read_keys,
    readers,
    resolve,
    spelled,
    split_name,
    written_out,
)
from empg_jax.algorithms.signatures import FACTORIES, RECIPES, Parameter
from empg_jax.config.explain import explain
from empg_jax.errors import nearest

ALGORITHM_NAMES = (*RECIPES, *(f"{name}_{kind}" for name in RECIPES for kind in MODULATIONS))
# The others compare the attempts of one task; REINFORCE++ does so with algorithm.group_baseline alone.
NO_GROUP_BASELINE = ("reinforce", "reinforce_pp", "reinforce_pp_baseline", "ppo", "turn_ppo")
IGNORES_PENALTIES = ("graft",)  # their credit reads neither returns nor scores of turns
SCALES_CLIP = ("a2tgpo",)  # what a turn's clip range is multiplied by is part of their credit


class Section(BaseModel):
    """A group of keys: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


# --- Keys from the factories' signatures -------------------------------------------------------------------

_TYPES: dict[str, Any] = {
    "Literal": Literal,
    "Scalar": float,
    "NonNegative": Annotated[float, Field(ge=0)],
    "Positive": Annotated[float, Field(gt=0)],
    "AboveOne": Annotated[float, Field(gt=1)],
    "Share": Annotated[float, Field(ge=0, le=1)],
    "Portion": Annotated[float, Field(gt=0, le=1)],
    "Count": Annotated[int, Field(ge=0)],
    "Length": Annotated[int, Field(ge=1)],
}
# Keys that switch on a part of their own: by default that part is absent.
_ABSENT: dict[str, Any] = {
    "kl_coef": 0.0,
    "overlong_length": None,
    "overlong_cache": None,
    "correction.sequence_delta": None,
    "correction.entropy_low": None,
    "correction.entropy_high": None,
    "mask_truncated": OFF,
    "drop_void": OFF,
    "drop_uniform": OFF,
}


def _key_field(key: str) -> tuple[Any, Any]:
    """Make the type and field of a key from the keywords that read it."""
    found: list[Parameter] = [FACTORIES[slot][factory][option] for slot, factory, option in readers(key)]
    kind = eval(found[0].annotation, dict(_TYPES))  # the annotation, as written in our own source
    default, sentence = found[0].default, found[0].sentence
    if key in _ABSENT:
        default = _ABSENT[key]
        kind = Literal["none", *found[0].choices] if default == OFF else kind
    elif any(parameter.default != default for parameter in found):
        default, sentence = None, f"{sentence.rstrip('.')}; null is the chosen part's own."
    assert default is not inspect.Parameter.empty, key
    return (kind | None if default is None else kind), Field(default, description=sentence)


def _keys_below(section: str) -> dict[str, tuple[Any, Any]]:
    """Make the fields of one of the sections inside ``algorithm``."""
    prefix = f"{section}."
    return {
        key.removeprefix(prefix): _key_field(key)
        for key in all_keys()
        if key.startswith(prefix) and readers(key)
    }


def _top_keys(*slots: str) -> dict[str, tuple[Any, Any]]:
    """Make the fields of some slots whose keys are in the section itself, not in a section inside it."""
    keys = [key for key in all_keys() if "." not in key and key != "invalid_penalty" and readers(key)]
    return {key: _key_field(key) for key in keys if readers(key)[0][0] in slots}


def _choice(slot: str, default: str, sentence: str) -> tuple[Any, Any]:
    """Make the key that chooses a slot's part; null keeps the part of a custom recipe."""
    names = tuple(spelled(factory) for factory in FACTORIES[slot])
    return Literal[names] | None, Field(default, description=sentence)


class EmpgConfig(create_model("EmpgKeys", __base__=Section, **_keys_below("empg"))):  # type: ignore
    """Entropy-Modulated Policy Gradients (arXiv 2509.09265)."""


class AemConfig(create_model("AemKeys", __base__=Section, **_keys_below("aem"))):  # type: ignore
    """Adaptive Entropy Modulation (arXiv 2605.00425)."""


class GraphConfig(create_model("GraphKeys", __base__=Section, **_keys_below("graph"))):  # type: ignore
    """The state graph of a task's attempts (CRBC, GraphHCA, GRAFT, GraphGPO)."""


class HgpoConfig(create_model("HgpoKeys", __base__=Section, **_keys_below("hgpo"))):  # type: ignore
    """Groups by common history (HGPO, arXiv 2602.22817)."""


class CriticConfig(create_model("CriticKeys", __base__=Section, **_keys_below("critic"))):  # type: ignore
    """The critic of PPO: a value head on the policy's own network."""


_OF_CORRECTION: dict[str, Any] = {
    "kind": (
        Literal["none", "tis", "mis"] | None,
        Field(OFF, description="Truncated (tis) or masked (mis) importance sampling of sampler and learner."),
    ),
    **_keys_below("correction"),
}


class CorrectionConfig(create_model("CorrectionKeys", __base__=Section, **_OF_CORRECTION)):  # type: ignore
    """Corrections for data that another policy sampled: the engine's rounding, or older weights."""


def _section(kind: Any, sentence: str) -> tuple[Any, Any]:
    return kind, Field(default_factory=kind, description=sentence)


_FIELDS: dict[str, Any] = {
    "name": (
        str | None,
        Field("grpo", description="Algorithm by name; _empg or _aem behind it sets modulation."),
    ),
    "entry_point": (
        str | None,
        Field(
            None,
            pattern=r"^[\w.]+:\w+$",
            examples=["module:RECIPE", "mine:RECIPE"],
            description="A Recipe of your own, as package.module:ATTRIBUTE, in place of algorithm.name.",
        ),
    ),
    "modulation": (
        Literal["none", "empg", "aem"] | None,
        Field(OFF, description="Entropy modulation of the credit."),
    ),
    "empg": _section(EmpgConfig, "Settings of EMPG."),
    "aem": _section(AemConfig, "Settings of AEM."),
    **_top_keys("estimate"),
    "hgpo": _section(HgpoConfig, "Settings of HGPO."),
    "graph": _section(GraphConfig, "Settings of the methods on a state graph."),
    "critic": _section(CriticConfig, "Settings of the critic."),
    **_top_keys("penalise"),
    "loss": _choice("objective", "ppo_clip", "Policy loss."),
    **_top_keys("objective"),
    "aggregation": _choice("aggregate", "token-mean", "Reduction of token losses to one number."),
    **_top_keys("aggregate", "keep", "kl"),
    "entropy_coef": (Annotated[float, Field(ge=0)], Field(0.0, description="Weight of the entropy bonus.")),
    "entropy_source": (
        Literal["learner", "engine"],
        Field(
            "learner",
            description="Source of entropies: a score pass of the learner, or the sampler's records.",
        ),
    ),
    "correction": _section(CorrectionConfig, "Corrections for data that another policy sampled."),
}
_FIELDS["kl_coef"] = (_FIELDS["kl_coef"][0] | None, _FIELDS["kl_coef"][1])


def start_spec(values: Mapping[str, Any]) -> Spec:
    """Find the initial spec of an algorithm by its name or entry point.

    Raises:
      ValueError: an entry point that cannot be used.
    """
    if values.get("entry_point") is not None:
        # JAX is loaded here only: a custom recipe must be imported to be inspected.
        from empg_jax.algorithms.configure import spec_of
        from empg_jax.algorithms.entry import load_recipe

        try:
            return spec_of(load_recipe(values["entry_point"]))
        except ValueError as error:
            raise ValueError(f"algorithm.entry_point={error}") from None
    return named_spec(*split_name(values.get("name") or "grpo"))


class AlgorithmConfig(create_model("AlgorithmKeys", __base__=Section, **_FIELDS)):  # type: ignore
    """Credit assignment and loss."""

    @model_validator(mode="before")
    @classmethod
    def _write_out(cls, data: Any) -> Any:
        """Write out the keys that a name stands for; explicit keys win, except for a second modulation."""
        if not isinstance(data, dict):
            return data
        entry, name = data.get("entry_point"), data.get("name", "grpo")
        if entry is not None and data.get("name") is not None:
            raise ValueError(
                f"algorithm.name={name} and algorithm.entry_point={entry} exclude each other: set "
                "algorithm.name=null"
            )
        if entry is not None:
            if not (isinstance(entry, str) and ":" in entry):
                return data  # the field's own check reports the mistake
            name = None
        elif not isinstance(name, str):
            return data
        elif name not in ALGORITHM_NAMES:
            hint = (
                nearest(name, ALGORITHM_NAMES) or f"; choose {' or '.join(RECIPES)}, also with _empg or _aem"
            )
            raise ValueError(f"algorithm.name={name} is unknown{hint}")
        base, kind = split_name(name) if name else (None, "")
        explicit = data.get("modulation", kind)
        if kind and explicit != kind:
            raise ValueError(
                f"algorithm.name={name} and algorithm.modulation={explicit} name two modulations: use "
                f"algorithm.name={base} with algorithm.modulation={explicit}, or leave one out"
            )
        spec = start_spec({"name": name, "entry_point": entry})
        return nested(_filled(spec, flatten(data))) | {"name": base}

    @model_validator(mode="after")
    def _check(self) -> AlgorithmConfig:
        problems = list(self._contradictions())
        if not any("set together" in problem for problem in problems):
            problems += self._idle_keys()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _idle_keys(self) -> Iterator[str]:
        defaults = flat_defaults()
        values = {key: value for key, value in flatten(self.model_dump()).items() if key not in NOT_OF_PARTS}
        spec = start_spec({"name": self.name, "entry_point": self.entry_point})
        read = read_keys(choose(spec, values))
        kept = (*read, *SELECTORS)
        given = {key: value for key, value in values.items() if key in kept or value != defaults[key]}
        yield from resolve(spec, given, self.name or self.entry_point).idle.values()

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
        if self.name in SCALES_CLIP and self.loss and not _clips(self.loss):
            yield (
                f"algorithm.name={self.name} gives every turn a clip range, and algorithm.loss={self.loss} "
                "clips no ratio: use turn_ratio_clip, which is that algorithm's own"
            )
        if correction.kind == "tis" and self.loss == "decoupled_ppo":
            yield (
                "algorithm.correction.kind=tis with algorithm.loss=decoupled_ppo: that loss has weights of "
                "its own; use algorithm.correction.kind=none"
            )
        if self.entropy_source == "engine":
            compared = [f"correction.kind={correction.kind}"] if correction.kind not in (OFF, None) else []
            compared += ["loss=decoupled_ppo"] if self.loss == "decoupled_ppo" else []
            if correction.sequence_delta is not None and correction.sequence_logprobs == "learner":
                compared.append("correction.sequence_logprobs=learner")
            for key in compared:
                yield (
                    f"algorithm.{key} compares learner and sampler, but algorithm.entropy_source=engine "
                    "takes "
                    "the sampler's word for the learner's: use algorithm.entropy_source=learner"
                )


def _clips(loss: str) -> bool:
    """Tell whether a loss clips the ratio of probabilities."""
    return "clip_low" in FACTORIES["objective"][OBJECTIVE_NAMES.get(loss, loss)]


def flat_defaults() -> dict[str, Any]:
    """List the default of every key of the section."""
    found: dict[str, Any] = {}
    for name, field in AlgorithmConfig.model_fields.items():
        default = field.get_default(call_default_factory=True)
        found |= (
            flatten(default.model_dump(), f"{name}.") if isinstance(default, Section) else {name: default}
        )
    return found


def _filled(spec: Spec, given: dict[str, Any]) -> dict[str, Any]:
    """Add to the given keys the values that the chosen parts set themselves."""
    try:
        chosen = choose(spec, given)
    except (ValueError, TypeError):  # a bad choice: reported together with the other mistakes
        return given
    said = {key: value for key, value in written_out(chosen).items() if key != "invalid_penalty"}
    return {**said, **given}  # the key of this penalty is env.invalid_penalty


def check_values(name: str, values: Mapping[str, Any]) -> None:
    """Check keys of the section for an algorithm.

    Args:
      name: the algorithm's name.
      values: by dotted keys.

    Raises:
      ValueError: a value is of another type than its key, or out of its range.
    """
    try:
        AlgorithmConfig.model_validate({"name": name, **nested(values)})
    except ValidationError as error:
        raise ValueError(explain(AlgorithmConfig, error.errors()[0])[0]) from None


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Write dotted keys as nested tables."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        node = nested
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return nested
