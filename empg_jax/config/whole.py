"""The configuration of a run: its sections, and which combinations of their values cannot work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import Field, PrivateAttr, model_validator

from empg_jax.config.algorithm import IGNORES_PENALTIES, NO_GROUP_BASELINE, AlgorithmConfig, Section
from empg_jax.config.hosts import HostsConfig
from empg_jax.config.lag import find_lag, lag_notes
from empg_jax.config.model import MeshConfig, ModelConfig
from empg_jax.config.sections import (
    CheckpointConfig,
    EnvConfig,
    EvalConfig,
    LogConfig,
    RolloutConfig,
    SftConfig,
    TrainConfig,
)
from empg_jax.config.serve import ServeConfig
from empg_jax.config.server import server_problems
from empg_jax.config.workers import FaultsConfig, WorkersConfig
from empg_jax.config.yaml import write_text


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
        lag = find_lag(self.model_dump())
        more = (*_penalty_notes(self), *_step_notes(self), *_idle_notes(self))
        return (*self._notes, *lag_notes(lag, self.algorithm), *more)

    def with_notes(self, lines: Iterable[str]) -> Config:
        """Return the same configuration with more notes."""
        noted = self.model_copy()
        noted._notes = (*self._notes, *lines)
        return noted

    def to_yaml(self) -> str:
        """Write the resolved configuration as YAML; `load_config` reads it back to an equal object."""
        return write_text(self.model_dump(mode="json"))


def _penalty_notes(config: Config) -> Iterator[str]:
    algorithm = config.algorithm
    penalties = {
        "env.invalid_penalty": config.env.invalid_penalty,
        "algorithm.overlong_length": algorithm.overlong_length,
    }
    for key, value in penalties.items():
        if value and algorithm.name in IGNORES_PENALTIES:
            yield (
                f"{key}={value} has no effect with algorithm.name={algorithm.name}: its credit reads neither "
                "returns nor scores of turns"
            )


def _one_step(config: Config) -> str:
    """Say why nothing can have moved since the update began; empty where it can."""
    if config.train.num_minibatches * config.train.epochs > 1:
        return ""
    return (
        "has no effect with one optimizer step per update: it compares the policy with that before the "
        "update; use train.num_minibatches=2 or more, or train.epochs=2"
    )


def _step_notes(config: Config) -> Iterator[str]:
    correction = config.algorithm.correction
    values = {"entropy_low": correction.entropy_low, "entropy_high": correction.entropy_high}
    if correction.sequence_delta is not None and correction.sequence_logprobs == "learner":
        values["sequence_delta"] = correction.sequence_delta
    for key, value in values.items():
        if value is not None and (why := _one_step(config)):
            yield f"algorithm.correction.{key}={value} {why}"


def _idle_notes(config: Config) -> Iterator[str]:
    """Tell of values that others switch off; a file may have them, and an override switched them off."""
    train, env, lora = config.train, config.env, config.model.lora
    if train.schedule == "constant" and train.final_learning_rate not in (None, train.learning_rate):
        last = f"{train.final_learning_rate:g}"
        yield f"train.final_learning_rate={last} has no effect with train.schedule=constant"
    if env.context == "transcript" and env.history != type(env).model_fields["history"].default:
        yield f"env.history={env.history} has no effect with env.context=transcript, which holds all turns"
    for key in ("alpha", "targets") if not lora.rank else ():
        value = getattr(lora, key)
        if value != type(lora).model_fields[key].default:
            told = list(value) if key == "targets" else f"{value:g}"
            yield f"model.lora.{key}={told} has no effect with model.lora.rank=0: every parameter is trained"


def _env_problems(config: Config) -> Iterator[str]:
    env = config.env
    if env.name is None and env.entry_point is None:
        yield "env.name=null and env.entry_point=null: name an environment, for example env.name=household"
    if env.history_mode == "append" and env.context == "window":
        yield (
            "env.history_mode=append has no effect with env.context=window: every turn has a fresh prompt "
            "there; use env.context=transcript"
        )
    if env.anchor == "state" and config.algorithm.anchor_similarity != 1.0:
        yield (
            f"env.anchor=state with algorithm.anchor_similarity={config.algorithm.anchor_similarity}, which "
            "compares observations: use env.anchor=observation"
        )
    if env.parser not in (None, "line", "whole") and config.sft.updates and config.sft.data is None:
        yield (
            f"env.parser={env.parser}: the expert shows bare actions with sft.updates={config.sft.updates}; "
            "set sft.updates=0, or env.parser=line"
        )


def _attempts_compared(algorithm: AlgorithmConfig) -> list[str]:
    """List the keys, with their values, that leave a task's only attempt without credit."""
    keys = []
    if algorithm.name is not None and algorithm.name not in NO_GROUP_BASELINE:
        keys += [f"algorithm.name={algorithm.name}"] if algorithm.singleton != "raw" else []
    elif algorithm.group_baseline:
        keys.append("algorithm.group_baseline=true")
    if algorithm.modulation == "empg" and algorithm.empg.mixed_groups_only:
        keys.append("algorithm.empg.mixed_groups_only=true")
    if algorithm.drop_uniform != "none":
        keys.append("algorithm.drop_uniform=group")
    return keys


def _rollout_problems(config: Config) -> Iterator[str]:
    rollout, algorithm = config.rollout, config.algorithm
    if rollout.max_response_tokens >= rollout.max_tokens:
        yield (
            f"rollout.max_response_tokens={rollout.max_response_tokens} must be smaller than "
            f"rollout.max_tokens={rollout.max_tokens}, which also holds the prompts"
        )
    comparing = _attempts_compared(algorithm)
    if rollout.group_size == 1:
        for key in comparing:
            yield (
                f"rollout.group_size=1 with {key}: it compares the attempts of one task, so the policy "
                "would learn nothing; use rollout.group_size=2 or more"
            )
    lowest = 2 if comparing else 1
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
    bands = (algorithm.correction.entropy_low, algorithm.correction.entropy_high)
    if algorithm.entropy_source == "engine" and bands != (None, None) and config.model.dtype != "float32":
        yield (
            "algorithm.entropy_source=engine: algorithm.correction.entropy_low and entropy_high compare the "
            "sampler's entropies with the learner's, which differ by rounding with "
            f"model.dtype={config.model.dtype}: use algorithm.entropy_source=learner"
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
    yield from _page_problems(rollout)
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


def _page_problems(rollout: RolloutConfig) -> Iterator[str]:
    pages, tokens = rollout.page_tokens, rollout.kv_tokens
    if tokens and not pages:
        yield f"rollout.kv_tokens={tokens} has no effect without rollout.page_tokens, such as 16"
    elif tokens and pages and tokens < (right := -(-rollout.max_tokens // pages) * pages):
        yield (
            f"rollout.kv_tokens={tokens} does not hold one conversation of rollout.max_tokens="
            f"{rollout.max_tokens} in pages of rollout.page_tokens={pages}: use at least {right}"
        )
    if pages and rollout.data > 1:
        yield (
            f"rollout.page_tokens={pages} with rollout.data={rollout.data}: all slots use one pool of pages, "
            "which is not split; use rollout.tensor, or leave rollout.page_tokens out"
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
    frozen = config.algorithm.critic.warmup_updates or 0
    if 0 < train.updates <= frozen:
        yield (
            f"algorithm.critic.warmup_updates={frozen} leaves the policy none of train.updates="
            f"{train.updates}"
        )
    yield from _rate_problems("train", train.learning_rate, train.final_learning_rate)
    yield from _rate_problems("sft", config.sft.learning_rate, config.sft.final_learning_rate)
    if train.max_kl is not None and (why := _one_step(config)):
        yield f"train.max_kl={train.max_kl} {why}"
    if train.on_kl != "skip" and train.max_kl is None:
        yield f"train.on_kl={train.on_kl} has no effect without train.max_kl"
    first = int(train.profile.partition(":")[0]) if train.profile else 0
    if 0 < train.updates < first:
        yield f"train.profile={train.profile} begins after the last update, train.updates={train.updates}"
    yield from _length_problems(config)


def _rate_problems(section: str, peak: float, last: float | None) -> Iterator[str]:
    if last is not None and last > peak:
        yield (
            f"{section}.final_learning_rate={last:g} is above {section}.learning_rate={peak:g}, from which "
            "the rate falls: lower it, or leave it out"
        )


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
