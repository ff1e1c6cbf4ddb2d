"""Reading of a configuration: one frozen, strict object, from a YAML file and dotted overrides.

Every key has a one-sentence description (`describe` lists them all). Every mistake in a configuration (an
unknown key, a wrong type, an impossible combination, a missing or malformed file, a bad override) is a
`ConfigError`: one readable message with the full key path, the value, and the nearest valid key or choice.

The modules `model`, `sections`, `workers` and `algorithm` define the sections; `whole` joins them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from empg_jax.algorithms.keys import flatten
from empg_jax.config.algorithm import ALGORITHM_NAMES
from empg_jax.config.explain import explain, list_keys, list_literals
from empg_jax.config.lag import find_lag, with_lag_defaults
from empg_jax.config.model import SIZES
from empg_jax.config.overlay import check_command, overlay
from empg_jax.config.whole import Config as Config
from empg_jax.config.yaml import apply_override, drop_options, find_file, is_packaged, merge, read_chain
from empg_jax.errors import ConfigError

# Keys that may change on resume; any other change would make the resumed run a different experiment.
# The machines may, where learner and engine lie on them, and what fits there in a pass: all numbers stay the
# same but for rounding. So may the place of the checkpoints, which then were copied or moved there.
RESUMABLE_KEYS = (
    *("train.updates", "compile_cache", "log.*", "hosts.*", "mesh.*", "serve.*", "train.profile"),
    *("train.micro_tokens", "train.share_prefix"),
    *("rollout.data", "rollout.tensor", "rollout.devices", "rollout.release"),
    *("rollout.url", "rollout.weights_dir", "rollout.request_timeout", "checkpoint.dir"),
)


def load_config(
    name_or_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    drop_unused: bool = False,
    algorithm: str | None = None,
) -> Config:
    """Read a configuration.

    Args:
      name_or_path: a packaged name (``quickstart``), or the path of a YAML file.
      overrides: overrides of the form ``section.key=value``, the value in YAML; later ones win. If they name
        another environment, the file's options for its own one are left out.
      drop_unused: leave out the file's keys that mean nothing to the algorithm that the overrides name, as is
        done with a packaged file; else they are a mistake.
      algorithm: name of an algorithm in place of all that the file has in this section.

    Returns:
      The checked, frozen configuration; its name is the file's unless the file sets one. Its ``notes`` list
      the keys of the file, or of the files that it starts from, that were dropped.

    Raises:
      ConfigError: the configuration is wrong; one message lists all problems.
    """
    path = find_file(name_or_path)
    values, notes = _read_file(path)
    if algorithm is not None:
        values["algorithm"], notes = {"name": algorithm}, []
    notes += drop_options(values, overrides)
    filed, command = copy.deepcopy(values.get("algorithm", {})), dict[str, Any]()
    for override in overrides:
        apply_override(values, override)
        if override.partition("=")[0].strip().partition(".")[0] == "algorithm":
            apply_override(command, override)
    commanded = command.get("algorithm")
    if commanded is not None:
        values["algorithm"], dropped = overlay(
            filed, commanded, source=path.name, drop_replaced=drop_unused or is_packaged(path)
        )
        notes += dropped
    try:
        if (lag := find_lag(values)) is not None:
            is_of_command = lag in [override.replace(" ", "") for override in overrides]
            chosen = (commanded if is_of_command else values.get("algorithm")) or {}
            is_given = "entropy_source" in chosen
            values, changed = with_lag_defaults(
                values,
                lambda values: Config.model_validate(values).algorithm,
                lag=lag,
                is_entropy_source_given=is_given,
            )
            notes += changed
        config = Config.model_validate(values)
        # Defaults are no settings in a file, but a command's key that has no effect is a mistake even then.
        if idle := list(check_command(config.algorithm, commanded)):
            raise ConfigError(_unusable(name_or_path, idle))
        return config.with_notes([*notes, *_idle_sizes(config, overrides)])
    except ValidationError as error:
        lines = [line for item in error.errors() for line in explain(Config, item)]
        raise ConfigError(_unusable(name_or_path, lines)) from None


def _read_file(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read a file on top of its base, and that one on top of its own.

    Tables are merged. Algorithm keys are laid over those of the base as a command's are over those of a
    packaged file.

    Returns:
      The nested values, with the file's name, and a note on each key that a file of the user's own drops.
    """
    (source, values), *others = read_chain(path)
    notes: list[str] = []
    for file, given in others:
        filed, values = values.get("algorithm"), merge(values, given)
        if "algorithm" in given:
            values["algorithm"], dropped = overlay(
                filed, given["algorithm"], source=source.name, drop_replaced=True
            )
            notes += [] if is_packaged(file) else dropped
        source = file
    return {"name": path.stem} | values, notes


def _idle_sizes(config: Config, overrides: Sequence[str]) -> Iterator[str]:
    """Yield a note for each size that a command gives to a model that has its own."""
    model = config.model
    source = f"model.path={model.path}" if model.path is not None else f"model.preset={model.preset}"
    if model.path is None and model.preset is None:
        return
    for override in overrides:
        if override.partition("=")[0].strip().removeprefix("model.") in SIZES:
            yield f"{override} has no effect: {source} brings its own sizes"


def make_config(values: dict[str, Any], overrides: Sequence[str], source: str) -> Config:
    """Make a configuration from nested values in place of a file.

    Args:
      values: what differs from the defaults; an override wins.
      overrides: as of `load_config`.
      source: what the values describe, for the message of an error.

    Raises:
      ConfigError: the configuration is wrong; one message lists all problems.
    """
    values = copy.deepcopy(values)
    for override in overrides:
        apply_override(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [line for item in error.errors() for line in explain(Config, item)]
        raise ConfigError(_unusable(source, lines)) from None


def _unusable(name_or_path: str | Path, lines: Sequence[str]) -> str:
    return f"the configuration {name_or_path} cannot be used:\n  " + "\n  ".join(lines)


def check_resumable(overrides: Iterable[str]) -> None:
    """Refuse overrides that would turn a resumed run into a different experiment."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        if not _is_resumable(key):
            raise ConfigError(f"{override}: a resumed run may change only {' and '.join(RESUMABLE_KEYS)}")


def _is_resumable(key: str) -> bool:
    return key in RESUMABLE_KEYS or f"{key.partition('.')[0]}.*" in RESUMABLE_KEYS


def check_unchanged(saved: str, config: Config, source: str) -> None:
    """Refuse to resume with a configuration that is not the one of the checkpoint.

    Args:
      saved: the configuration that the checkpoint was written with, in YAML.
      config: the configuration to go on with.
      source: where that one comes from, for the message.

    Raises:
      ConfigError: keys differ that a resumed run may not change.
    """
    # A key that only one of them has belongs to another version of the program; but tables with free keys
    # (options of an environment, ...) are compared whole.
    tables = {key for key, default, _ in describe() if isinstance(default, dict)}
    before, now = (flatten(yaml.safe_load(text), whole=tables) for text in (saved, config.to_yaml()))
    changed = [
        f"{key}={now[key]} (was {before[key]})"
        for key in before.keys() & now.keys()
        if before[key] != now[key] and not _is_resumable(key)
    ]
    if changed:
        raise ConfigError(
            f"{source} was changed since the checkpoint was written: {', '.join(sorted(changed))}; a resumed "
            f"run may change only {' and '.join(RESUMABLE_KEYS)}: undo the change, or begin a new run"
        )


def list_choices() -> dict[str, list[str]]:
    """Return the choices of every key that has a closed list of choices, by key."""
    return {"algorithm.name": list(ALGORITHM_NAMES)} | {
        path: choices for path, choices in list_literals(Config).items() if choices
    }


def describe() -> list[tuple[str, Any, str]]:
    """List every key with its default and its description, in the order of the sections."""
    return list_keys(Config)
