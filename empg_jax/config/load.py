"""The configuration: one frozen, strict object, read from a YAML file and dotted overrides.

Every key has a one-sentence description (`describe` lists them all). Every mistake in a configuration (an
unknown key, a wrong type, an impossible combination, a missing or malformed file, a bad override) is a
`ConfigError`: one readable message with the full key path, the value, and the nearest valid key or choice.

The modules `model`, `sections` and `algorithm` define the sections. This module defines the whole
configuration, the checks across sections, and loading.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PrivateAttr, ValidationError, model_validator

from empg_jax.algorithms.keys import flatten
from empg_jax.config.algorithm import ALGORITHM_NAMES, NO_GROUP_BASELINE, AlgorithmConfig, Section
from empg_jax.config.explain import explain, list_keys, list_literals
from empg_jax.config.hosts import HostsConfig
from empg_jax.config.lag import find_lag, lag_notes, with_lag_defaults
from empg_jax.config.model import MeshConfig, ModelConfig
from empg_jax.config.overlay import check_command, overlay
from empg_jax.config.sections import (
    CheckpointConfig,
    EnvConfig,
    EvalConfig,
    FaultsConfig,
    LogConfig,
    RolloutConfig,
    SftConfig,
    TrainConfig,
    WorkersConfig,
)
from empg_jax.config.serve import ServeConfig
from empg_jax.config.server import server_problems
from empg_jax.config.yaml import apply_override, drop_options, find_file, is_packaged, read_file
from empg_jax.errors import ConfigError

# Keys that may change on resume; any other change would make the resumed run a different experiment.
# The machines may: all numbers stay the same but for rounding.
RESUMABLE_KEYS = (
    *("train.updates", "compile_cache", "log.*", "hosts.*", "mesh.*", "serve.*", "train.profile"),
    *("rollout.url", "rollout.weights_dir", "rollout.request_timeout"),
)


class Config(Section):
    """The complete configuration of a run."""

    name: str = Field("run", min_length=1, description="Name of the experiment (default: the config file's).")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of weights, tasks and sampling.")
    run_dir: str | None = Field(None, description="Folder of the run (default runs/<name>-<time>).")
    compile_cache: str | None = Field(
        "auto", description="Folder of compiled programs; auto is ~/.cache/empg-jax/xla, null keeps none."
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="The policy.")
    env: EnvConfig = Field(default_factory=EnvConfig, description="The environment.")
    rollout: RolloutConfig = Field(default_factory=RolloutConfig, description="Sampling.")
    workers: WorkersConfig = Field(default_factory=WorkersConfig, description="Environment processes.")
    faults: FaultsConfig = Field(default_factory=FaultsConfig, description="Treatment of failures.")
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig, description="Credit and loss.")
    train: TrainConfig = Field(default_factory=TrainConfig, description="Optimization.")
    sft: SftConfig = Field(default_factory=SftConfig, description="Warm start.")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="Evaluation.")
    mesh: MeshConfig = Field(default_factory=MeshConfig, description="Devices.")
    hosts: HostsConfig = Field(default_factory=HostsConfig, description="Machines that train together.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Checkpoints.")
    log: LogConfig = Field(default_factory=LogConfig, description="Logs.")
    serve: ServeConfig = Field(default_factory=ServeConfig, description="The policy behind HTTP.")
    _notes: tuple[str, ...] = PrivateAttr(default=())

    @model_validator(mode="before")
    @classmethod
    def _sample_dynamically(cls, data: Any) -> Any:
        """Switch `rollout.filter_groups` on for dapo, unless it is set."""
        algorithm, rollout = (data.get(key) or {} for key in ("algorithm", "rollout"))
        name = algorithm.get("name") if isinstance(algorithm, dict) else getattr(algorithm, "name", None)
        if not isinstance(rollout, dict) or not str(name).startswith("dapo"):
            return data
        return {**data, "rollout": {"filter_groups": True, **rollout}}

    @model_validator(mode="after")
    def _check_across(self) -> Config:
        parts = (_folder_problems, _env_problems, _rollout_problems, _learner_problems)
        problems = [problem for part in parts for problem in part(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user before the run: keys that were dropped, and risks."""
        return (*self._notes, *lag_notes(find_lag(self.model_dump()), self.algorithm))

    def with_notes(self, lines: Iterable[str]) -> Config:
        """Return the same configuration with more notes."""
        noted = self.model_copy()
        noted._notes = (*self._notes, *lines)
        return noted

    def to_yaml(self) -> str:
        """Write the resolved configuration as YAML; `load_config` reads it back to an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


# --- Checks across sections --------------------------------------------------------------------------------


def _env_problems(config: Config) -> Iterator[str]:
    env = config.env
    if env.name is None and env.entry_point is None:
        yield "env.name=null and env.entry_point=null: name an environment, for example env.name=household"
    if env.history_mode == "append" and env.context == "window":
        yield (
            "env.history_mode=append has no effect with env.context=window: every turn has a fresh prompt "
            "there; use env.context=transcript"
        )
    if env.parser not in (None, "line", "whole") and config.sft.updates and config.sft.data is None:
        yield (
            f"env.parser={env.parser}: the expert shows bare actions with sft.updates={config.sft.updates}; "
            "set sft.updates=0, or env.parser=line"
        )


def _rollout_problems(config: Config) -> Iterator[str]:
    rollout, algorithm = config.rollout, config.algorithm
    if rollout.max_response_tokens >= rollout.max_tokens:
        yield (
            f"rollout.max_response_tokens={rollout.max_response_tokens} must be smaller than "
            f"rollout.max_tokens={rollout.max_tokens}, which also holds the prompts"
        )
    compares_attempts = algorithm.name is not None and algorithm.name not in NO_GROUP_BASELINE
    if rollout.group_size == 1 and compares_attempts:
        yield (
            f"rollout.group_size=1 with algorithm.name={algorithm.name}: its baseline compares the attempts "
            "of one task, so every advantage would be 0; use rollout.group_size=2 or more"
        )
    lowest = 2 if compares_attempts else 1
    if rollout.min_group_size is not None and not lowest <= rollout.min_group_size <= rollout.group_size:
        yield (
            f"rollout.min_group_size={rollout.min_group_size} must lie between {lowest} and "
            f"rollout.group_size={rollout.group_size}"
        )
    lag = config.train.max_lag
    older = find_lag(config.model_dump())
    if algorithm.entropy_source == "engine" and older is not None:
        yield (
            f"algorithm.entropy_source=engine needs on-policy data, but {older}: leave that out, or use "
            "algorithm.entropy_source=learner"
        )
    if rollout.stored is not None and config.env.sampler != "uniform":
        yield (
            f"env.sampler={config.env.sampler} has no effect with rollout.stored={rollout.stored}: stored "
            "groups are taken in their order; use env.sampler=uniform"
        )
    if rollout.stored is not None and lag > 0:
        yield f"train.max_lag={lag} has no effect with rollout.stored={rollout.stored}: nothing is sampled"
    if rollout.max_stale_gap != 0.05 and rollout.publish != "burst":
        yield (
            f"rollout.max_stale_gap={rollout.max_stale_gap} has no effect with rollout.publish="
            f"{rollout.publish}: KV is never kept over a publication there"
        )
    if rollout.release and lag:
        yield f"rollout.release=true needs train.max_lag=0: with {lag} the engine samples during updates"
    if rollout.publish == "burst" and lag == 0:
        yield (
            "rollout.publish=burst has no effect with train.max_lag=0: nothing is sampled when weights arrive"
        )
    if rollout.deterministic and lag > 0 and rollout.schedule is None:
        yield (
            f"rollout.deterministic=true with train.max_lag={lag}: when new weights arrive depends on the "
            "clock there; use train.max_lag=0, or rollout.schedule=RUN/schedule.jsonl to repeat a run"
        )
    if rollout.schedule is not None and not (rollout.deterministic and lag > 0):
        yield (
            f"rollout.schedule={rollout.schedule} repeats a run with a lag: it needs "
            "rollout.deterministic=true and that run's train.max_lag"
        )
    yield from server_problems(rollout, config.hosts)
    if rollout.group_size == 1 and rollout.filter_groups:
        yield "rollout.filter_groups=true compares the attempts of a task, but rollout.group_size=1"
    if rollout.max_refills != 10 and not rollout.filter_groups:
        yield f"rollout.max_refills={rollout.max_refills} has no effect with rollout.filter_groups=false"
    buckets = rollout.prefill_buckets
    if buckets is not None and (not buckets or list(buckets) != sorted(set(buckets))):
        yield f"rollout.prefill_buckets={list(buckets)} must be ascending lengths, at least one"
    elif buckets and buckets[-1] > rollout.max_tokens:
        yield (
            f"rollout.prefill_buckets={list(buckets)} reaches beyond rollout.max_tokens={rollout.max_tokens}"
        )


def _devices_hint(mesh: MeshConfig) -> str:
    devices = mesh.data * mesh.fsdp * mesh.tensor * mesh.sequence
    return f" (this mesh takes {devices} devices)" if devices > 1 else ""


def _folder_problems(config: Config) -> Iterator[str]:
    run_dir, directory = config.run_dir, config.checkpoint.dir
    if run_dir is not None and "://" in run_dir:
        yield (
            f"run_dir={run_dir} is an object store; a run needs a folder of a file system, for several hosts "
            "one that all of them share (for example a mounted bucket); only checkpoint.dir may be gs://"
        )
    if directory is None or "://" not in directory:
        return
    if not directory.startswith("gs://"):
        yield (
            f"checkpoint.dir={directory} is an object store that orbax cannot write arrays to: it knows "
            "gs:// alone; mount the bucket (for example with mountpoint-s3 or rclone) and name the folder"
        )
    elif not all(directory.removeprefix("gs://").strip("/").partition("/")[::2]):
        yield f"checkpoint.dir={directory} must name a folder in a bucket: gs://BUCKET/FOLDER"


def _learner_problems(config: Config) -> Iterator[str]:
    rollout, train, mesh, model = config.rollout, config.train, config.mesh, config.model
    rows, shards = train.micro_tokens // rollout.max_tokens, mesh.data * mesh.fsdp
    if rows < 1 or rows % shards:
        right = rollout.max_tokens * max(math.ceil(rows / shards), 1) * shards
        yield (
            f"train.micro_tokens={train.micro_tokens} holds {rows} rows of rollout.max_tokens="
            f"{rollout.max_tokens}, which mesh.data={mesh.data} x mesh.fsdp={mesh.fsdp} cannot divide: "
            f"use train.micro_tokens={right}{_devices_hint(mesh)}"
        )
    if train.share_prefix and mesh.sequence > 1:
        yield (
            f"train.share_prefix=true with mesh.sequence={mesh.sequence}: shared beginnings cannot be split "
            "over time; use mesh.sequence=1 or train.share_prefix=false"
        )
    if rollout.max_tokens % mesh.sequence:
        yield f"mesh.sequence={mesh.sequence} must divide rollout.max_tokens={rollout.max_tokens}"
    if model.path is None and model.preset is None and model.num_heads % mesh.tensor:
        yield f"mesh.tensor={mesh.tensor} must divide model.num_heads={model.num_heads}"
    episodes = rollout.tasks_per_update * rollout.group_size
    if train.num_minibatches > episodes:
        yield (
            f"train.num_minibatches={train.num_minibatches} is more than the {episodes} episodes per update "
            "(rollout.tasks_per_update x rollout.group_size)"
        )
    if 0 < train.updates < train.warmup_updates:  # 0: a run of the warm start alone, which may go on later
        yield f"train.warmup_updates={train.warmup_updates} exceeds train.updates={train.updates}"
    first = int(train.profile.partition(":")[0]) if train.profile else 0
    if first > train.updates:
        yield f"train.profile={train.profile} begins after the last update, train.updates={train.updates}"
    yield from _length_problems(config)


def _length_problems(config: Config) -> Iterator[str]:
    """Compare the possible length of an episode with the lengths that the algorithm expects."""
    algorithm, rollout = config.algorithm, config.rollout
    longest = config.env.max_turns * rollout.max_response_tokens
    if algorithm.overlong_length is not None and algorithm.overlong_length > longest:
        yield (
            f"algorithm.overlong_length={algorithm.overlong_length} is never reached: an episode samples "
            "at most "
            f"{longest} tokens (env.max_turns={config.env.max_turns} x rollout.max_response_tokens="
            f"{rollout.max_response_tokens})"
        )
    if algorithm.ratio_unit == "trajectory" and config.env.context == "window":
        yield (
            "algorithm.ratio_unit=trajectory with env.context=window: a trajectory is spread over many "
            "rows there, "
            "and a ratio sees one row; use algorithm.ratio_unit=turn or segment"
        )


# --- Loading -----------------------------------------------------------------------------------------------


def load_config(
    name_or_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    drop_unused: bool = False,
) -> Config:
    """Read a configuration.

    Args:
      name_or_path: a packaged name (``quickstart``), or the path of a YAML file.
      overrides: overrides of the form ``section.key=value``, the value in YAML; later ones win. If they name
        another environment, the file's options for its own one are left out.
      drop_unused: leave out the file's keys that mean nothing to the algorithm that the overrides name, as is
        done with a packaged file; else they are a mistake.

    Returns:
      The checked, frozen configuration; its name is the file's unless the file sets one. Its ``notes`` list
      the keys of the file that were dropped.

    Raises:
      ConfigError: the configuration is wrong; one message lists all problems.
    """
    path = find_file(name_or_path)
    values = {"name": path.stem} | read_file(path)
    notes = drop_options(values, overrides)
    filed, command = copy.deepcopy(values.get("algorithm", {})), dict[str, Any]()
    for override in overrides:
        apply_override(values, override)
        if override.partition("=")[0].strip().partition(".")[0] == "algorithm":
            apply_override(command, override)
    commanded = command.get("algorithm")
    if commanded is not None:
        values["algorithm"], dropped = overlay(
            filed, commanded, source=path.name, is_packaged=drop_unused or is_packaged(path)
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
        config._notes = tuple(notes)
        return config
    except ValidationError as error:
        lines = [line for item in error.errors() for line in explain(Config, item)]
        raise ConfigError(_unusable(name_or_path, lines)) from None


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
    before, now = flatten(yaml.safe_load(saved)), flatten(yaml.safe_load(config.to_yaml()))
    # A key that only one of them has belongs to another version of the program.
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
