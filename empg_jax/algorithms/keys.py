"""The mapping from configuration keys to the parts that read them: plain names and values, no JAX.

A recipe is described by a `Spec`: for each slot the names and options of its parts. `resolve` lays keys over
a spec. Some keys *select* a part (``loss``, ``modulation``, ``correction.kind``); all others are keywords of
the factories, so a key that no chosen factory has is refused. A configuration is checked this way before JAX
is loaded.
"""

import dataclasses
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from empg_jax.algorithms.signatures import DEFAULTS, FACTORIES, RECIPES
from empg_jax.errors import closest

MODULATIONS = ("empg", "aem")
OFF = "none"
NOT_OF_PARTS = ("name", "entry_point", "entropy_source")  # keys of the section that no part reads

# How the keywords of a factory are spelled as keys, where it is not the keyword itself.
_SPELLED: dict[str, dict[str, str]] = {
    "turn_penalty": {"amount": "invalid_penalty"},
    "overlong": {"length": "overlong_length", "cache": "overlong_cache", "factor": "overlong_factor"},
    "ppo": {"lam": "critic.lam", "bootstrap": "critic.bootstrap"},
    "turn_ppo": {"bootstrap": "critic.bootstrap"},
    "decoupled_ppo": {"cap": "correction.stale_cap", "mode": "correction.stale_mode"},
    "gspo": {"unit": "ratio_unit"},
    "tis": {name: f"correction.{name}" for name in ("cap", "level", "normalize")},
    "mis": {name: f"correction.{name}" for name in ("low", "high", "level")},
    "entropy_ratio": {"low": "correction.entropy_low", "high": "correction.entropy_high"},
    "turn_ratio_clip": {"ratio": "turn_ratio"},
    "hgpo": {
        name: f"hgpo.{name}" for name in ("history", "alpha", "level_offset", "drop_zeros", "base_group")
    },
    "crbc": {name: f"graph.{name}" for name in ("beta", "weight", "trajectory_weight", "min_std", "sweeps")},
    "graph_hca": {name: f"graph.{name}" for name in ("floor", "weight", "sweeps")} | {"gamma": "graph.beta"},
    "graft": {"gamma": "graph.beta", "lam": "graph.lam", "sweeps": "graph.sweeps"},
    "graph_gpo": {
        "decay": "graph.decay",
        "step_weight": "graph.weight",
        "episode_weight": "graph.trajectory_weight",
        "sweeps": "graph.sweeps",
        "fail_node": "graph.fail_node",
    },
    "gagpo": {"normalize": "gagpo_normalize"},
    "igpo": {"normalize": "gain_statistics", "kind": "gain_kind"},
    "a2tgpo": {"alpha": "gain_weight", "clip_range": "gain_clip_range", "kind": "gain_kind"},
    "beacon": {"weight": "milestone_weight", "scale": "milestone_scale"},
    "sequence_mask": {"delta": "correction.sequence_delta", "logprobs_of": "correction.sequence_logprobs"},
    "mask_truncated": {"unit": "mask_truncated"},
    "drop_void": {"unit": "drop_void"},
    "drop_uniform": {"unit": "drop_uniform"},
    "seq-mean-token-mean": {"unit": "aggregation_unit"},
    "seq-mean-token-sum": {"unit": "aggregation_unit"},
    "seq-mean-token-sum-norm": {"scale": "loss_scale"},
    "seq-mean-token-const": {"unit": "aggregation_unit", "scale": "loss_scale"},
    "kl": {"coef": "kl_coef", "kind": "kl_kind"},
}
_PREFIXED = ("empg", "aem", "critic")  # their keys stand in a section of that name
# The key that chooses the part of a slot, for messages.
_DECIDERS = {"estimate": "name", "objective": "loss", "modulate": "modulation", "aggregate": "aggregation"}
_DECIDERS |= {"correct": "correction.kind", "critic": "name", "kl": "kl_coef", "penalise": "overlong_length"}
OBJECTIVE_NAMES = {"reinforce": "reinforce_loss"}  # the key's value, where it is not the factory's name
KEEPS = ("mask_truncated", "drop_void", "drop_uniform")  # keys that leave turns out of the loss
_BANDS = ("correction.entropy_low", "correction.entropy_high")
_ASKED = {  # parts that are there where one of these keys is set
    "entropy_ratio": _BANDS,
    "sequence_mask": ("correction.sequence_delta",),
    "overlong": ("overlong_length", "overlong_cache"),
}
_KINDS = ("tis", "mis")  # corrections that correction.kind chooses
_BESIDE = ("sequence_mask", "entropy_ratio")  # corrections that stand beside any other
SELECTORS = (
    *("modulation", "loss", "aggregation", "correction.kind", "correction.sequence_delta", "kl_coef"),
    *(*_BANDS, *KEEPS, "invalid_penalty", "overlong_length", "overlong_cache", "entropy_coef"),
)


class Chosen(NamedTuple):
    """A part by its factory's name (None for a function of the user's own) and its options."""

    factory: str | None
    options: dict[str, Any]
    label: str = ""


Spec = dict[str, tuple[Chosen, ...]]


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A spec with keys laid over it, and the keys that nothing reads, each with its message."""

    spec: Spec
    idle: dict[str, str]


def key_of(factory: str, option: str) -> str:
    """Spell a factory's keyword as a key of the ``algorithm`` section."""
    if factory in _PREFIXED:
        return f"{factory}.{option}"
    return _SPELLED.get(factory, {}).get(option, option)


def readers(key: str) -> list[tuple[str, str, str]]:
    """List slot, factory and keyword of everything that could read a key."""
    return [
        (slot, factory, option)
        for slot, factories in FACTORIES.items()
        for factory, options in factories.items()
        for option in options
        if key_of(factory, option) == key
    ]


def all_keys() -> list[str]:
    """List every key that a factory or a selector reads."""
    read = (
        key_of(factory, option)
        for factories in FACTORIES.values()
        for factory, options in factories.items()
        for option in options
    )
    return list(dict.fromkeys([*SELECTORS, *read]))


def flatten(values: Mapping[str, Any], prefix: str = "", whole: Container[str] = ()) -> dict[str, Any]:
    """Write nested tables as dotted keys; tables whose dotted key is in ``whole`` stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + key
        is_split = isinstance(value, Mapping) and name not in whole
        flat |= flatten(value, f"{name}.", whole) if is_split else {name: value}
    return flat


def split_name(name: str, names: Iterable[str] = RECIPES) -> tuple[str, str]:
    """Split a name into recipe and modulation: ``gigpo_aem`` is ``("gigpo", "aem")``."""
    base, _, kind = name.rpartition("_")
    known = tuple(names)
    return (base, kind) if name not in known and base in known and kind in MODULATIONS else (name, "")


def spelled(objective: str) -> str:
    """Give the value of ``loss`` that names a factory of objectives."""
    return next((value for value, factory in OBJECTIVE_NAMES.items() if factory == objective), objective)


def named_spec(name: str, kind: str = "") -> Spec:
    """Describe a named recipe, with a modulation if one is named."""
    slots = {slot: (Chosen(*part),) for slot, part in {**DEFAULTS, **RECIPES[name]}.items()}
    return slots | ({"modulate": (Chosen(kind, {}),)} if kind in MODULATIONS else {})


def choose(spec: Spec, values: Mapping[str, Any]) -> Spec:
    """Put the parts that the selecting keys choose into a spec, before any option is handed on."""
    chosen = {slot: tuple(parts) for slot, parts in spec.items()}
    for slot, factory in _selections(values):
        if factory is None:
            # "none" of one key does not empty the places of the others.
            others = chosen.get(slot, ()) if slot == "correct" else ()
            chosen[slot] = tuple(part for part in others if part.factory not in _KINDS)
        elif not any(part.factory == factory for part in chosen.get(slot, ())):
            chosen[slot] = (*_besides(slot, factory, chosen.get(slot, ())), Chosen(factory, {}))
    off = [key for key in KEEPS if values.get(key) == OFF]
    # Null where it is said of all keys that ask for a part: the part is absent.
    off += [name for name, keys in _ASKED.items() if all(values.get(key, OFF) is None for key in keys)]
    for slot in ("keep", "correct", "penalise"):
        chosen[slot] = tuple(part for part in chosen.get(slot, ()) if part.factory not in off)
    return chosen


def written_out(spec: Spec) -> dict[str, Any]:
    """Write a spec as keys: its choices, and the options that it sets itself; None for parts unknown."""
    objective, aggregate = (spec.get(slot, ()) for slot in ("objective", "aggregate"))
    modulation = spec.get("modulate", ())
    weighing = [part for part in spec.get("correct", ()) if part.factory not in _BESIDE]
    keys: dict[str, Any] = {
        "loss": spelled(objective[0].factory) if objective and objective[0].factory else None,
        "aggregation": aggregate[0].factory if aggregate else None,
        "modulation": modulation[0].factory if modulation else OFF,
        "correction.kind": weighing[0].factory if weighing else OFF,
    }
    for parts in spec.values():
        for part in parts:
            names = part.options if part.factory is not None else ()
            keys |= {key_of(str(part.factory), name): part.options[name] for name in names}
    for bonus in spec.get("entropy", ()):
        keys |= bonus.options
    if spec.get("kl") and spec["kl"][0].factory is None:
        keys["kl_coef"] = None
    return {key: value for key, value in keys.items() if key in _KNOWN}


def readable(spec: Spec, values: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the keys that select a part or that a chosen part reads."""
    read = read_keys(choose(spec, values))
    return {key: value for key, value in values.items() if key in read or key in SELECTORS}


def read_keys(spec: Spec) -> dict[str, tuple[str, str]]:
    """List the keys that the parts of a spec read: key -> (slot, factory)."""
    return {
        key_of(part.factory, option): (slot, part.factory)
        for slot, chosen in spec.items()
        for part in chosen
        if part.factory is not None
        for option in FACTORIES[slot].get(part.factory, {})
    }


def resolve(spec: Spec, values: Mapping[str, Any], name: str = "") -> Resolved:
    """Lay keys over a spec: choose parts, then hand each part the keys that it reads.

    Args:
      spec: of a named recipe, or of the user's own.
      values: dotted keys; a value of None means the part's own default where its keyword has no None.
      name: what messages call the recipe.

    Raises:
      ValueError: for a key that nothing could ever read, or an unknown choice.
    """
    for key in values:
        if key not in _KNOWN:
            near = closest(key, _KNOWN)
            hint = f"did you mean {near.rpartition('.')[2]!r}?" if near else f"known: {', '.join(_KNOWN)}"
            raise ValueError(f"unknown option {key}; {hint}")
    chosen = choose(spec, values)
    for slot, parts in chosen.items():
        chosen[slot] = tuple(_with_options(slot, part, values) for part in parts)
    read = read_keys(chosen)
    idle = {
        key: explain_idle(key, value, chosen, name)
        for key, value in values.items()
        if key not in read and key not in SELECTORS and not is_off(key, value)
    }
    return Resolved(chosen, idle)


def _selections(values: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """List the choices of the selecting keys: (slot, factory), the factory None for an emptied slot."""
    if (loss := values.get("loss")) is not None:
        yield "objective", _known("loss", OBJECTIVE_NAMES.get(loss, loss), FACTORIES["objective"])
    if (mode := values.get("aggregation")) is not None:
        yield "aggregate", _known("aggregation", mode, FACTORIES["aggregate"])
    if (kind := values.get("modulation")) is not None:
        yield "modulate", None if kind == OFF else _known("modulation", kind, (OFF, *MODULATIONS))
    if (kind := values.get("correction.kind")) is not None:
        yield "correct", None if kind == OFF else _known("correction.kind", kind, (OFF, *_KINDS))
    if values.get("correction.sequence_delta") is not None:
        yield "correct", "sequence_mask"
    if any(values.get(key) is not None for key in _BANDS):
        yield "correct", "entropy_ratio"
    if values.get("kl_coef") is not None:
        yield "kl", "kl" if values["kl_coef"] else None
    for key in KEEPS:
        if values.get(key, OFF) not in (None, OFF):
            yield "keep", key
    if values.get("invalid_penalty"):
        yield "penalise", "turn_penalty"
    if values.get("overlong_length") is not None or values.get("overlong_cache") is not None:
        if None in (values.get("overlong_length"), values.get("overlong_cache")):
            raise ValueError("overlong_length and overlong_cache are set together or not at all")
        yield "penalise", "overlong"


def _besides(slot: str, factory: str, parts: tuple[Chosen, ...]) -> tuple[Chosen, ...]:
    """Keep what stays in a slot that a new part enters."""
    if slot in ("penalise", "keep"):
        return parts
    if slot == "correct":
        return tuple(part for part in parts if part.factory in _BESIDE or factory in _BESIDE)
    return ()


def _known(key: str, value: Any, choices: Iterable[str]) -> str:
    if value not in choices:
        names = [spelled(choice) for choice in choices]
        raise ValueError(f"{key}={value!r} is not known; choose one of {', '.join(map(repr, names))}")
    return str(value)


def _with_options(slot: str, part: Chosen, values: Mapping[str, Any]) -> Chosen:
    """Give a part the options that keys set."""
    if part.factory is None:
        return part
    options = dict(part.options)
    for option, parameter in FACTORIES[slot].get(part.factory, {}).items():
        key = key_of(part.factory, option)
        if key in values and (values[key] is not None or parameter.takes_none):
            if parameter.choices:
                _known(key, values[key], parameter.choices)
            options[option] = values[key]
    return Chosen(part.factory, options, part.label)


def is_off(key: str, value: Any) -> bool:
    """Tell whether a key says that its own part is absent, or that a default holds."""
    if key in KEEPS:
        return value in (None, OFF)
    return value is None or (key in ("kl_coef", "invalid_penalty", "reward_kl_coef") and not value)


def explain_idle(key: str, value: Any, spec: Spec, name: str = "") -> str:
    """Explain that no part reads a key: name the chosen part, and the parts that would read the key."""
    found = readers(key)
    slot = found[0][0]
    decider = _DECIDERS.get(slot, slot)
    parts = spec.get(slot, ())
    if slot == "correct" and found[0][1] == "sequence_mask":
        return f"algorithm.{key}={value} has no effect with algorithm.correction.sequence_delta=null"
    if slot in ("kl", "penalise"):
        off = "0" if slot == "kl" else "null"
        return f"algorithm.{key}={value} has no effect with algorithm.{decider}={off}: set that key too"
    if decider == "name":
        found_name = name or _label(spec.get("estimate", ()))
    else:
        found_name = _named(slot, _label(parts))
    wanted = [_named(slot, factory) for found_slot, factory, _ in found if found_slot == slot]
    return (
        f"algorithm.{key}={value} has no effect with algorithm.{decider}={found_name}: "
        f"it belongs to {' and '.join(dict.fromkeys(wanted))}"
    )


def _label(parts: tuple[Chosen, ...]) -> str:
    return parts[0].label or str(parts[0].factory) if parts else OFF


def _named(slot: str, factory: str) -> str:
    if slot == "objective":
        return spelled(factory)
    return "ppo" if slot == "critic" and factory == "critic" else factory


_KNOWN = (*all_keys(), "correction.kind")
