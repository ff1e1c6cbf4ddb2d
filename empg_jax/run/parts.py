"""The parts of a run, its changing state, and how both are opened, saved and restored."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import optax

from empg_jax.algorithms.entry import source_hash
from empg_jax.engine.engine import Engine
from empg_jax.engine.interface import SamplingEngine
from empg_jax.learner.batching import BatchShape, make_batch
from empg_jax.learner.fingerprint import checksum
from empg_jax.learner.state import TrainState, init_state, restart_optimizer
from empg_jax.learner.update import Learner, make_learner
from empg_jax.metrics import MetricsLog
from empg_jax.models.decoder import DecoderConfig
from empg_jax.parallel.hosts import ALONE, Hosts
from empg_jax.parallel.mesh import make_mesh
from empg_jax.report.events import EventLog
from empg_jax.report.progress import Progress
from empg_jax.report.record import RunRecord
from empg_jax.report.tracking import open_trackers
from empg_jax.rollout.evaluator import Evaluator
from empg_jax.rollout.schedule import open_recorder
from empg_jax.rollout.shares import take_share
from empg_jax.rollout.thread import RolloutThread
from empg_jax.run.announcing import (
    announce_length,
    announce_model,
    announce_rows,
    tell_other_length,
    tell_other_recipe,
)
from empg_jax.run.assembly import (
    Language,
    make_algorithm_from,
    make_batch_shape,
    make_language,
    make_model,
    make_rl_optimizer,
    needs_reference,
)
from empg_jax.run.checkpoint import Checkpoints, Restored, check_base
from empg_jax.run.devices import learner_devices
from empg_jax.run.process import CompileCounter, PhaseClock, StopRequest
from empg_jax.run.restoring import restore_state
from empg_jax.run.sampling import filter_of, make_evaluator, make_rollout, make_sampler
from empg_jax.run.splits import check_splits
from empg_jax.run.weights import make_base, make_params
from empg_jax.types import Params, Trajectory
from empg_jax.workers.pool import EnvPool

if TYPE_CHECKING:
    from empg_jax.config import Config


# From a name and a number of programs to what is called before each is compiled.
Counted = Callable[[str, int], Callable[[], None]]


@dataclasses.dataclass(frozen=True)
class Parts:
    """The fixed parts of a run, from its start to its end. `RunState` holds everything that changes."""

    config: Config
    run_dir: Path
    language: Language
    engine: SamplingEngine
    learner: Learner
    shape: BatchShape
    schedule: optax.Schedule
    rollout: RolloutThread
    evaluator: Evaluator
    checkpoints: Checkpoints
    progress: Progress
    events: EventLog
    log: MetricsLog
    clock: PhaseClock
    compiles: CompileCounter
    should_stop: StopRequest
    settings: str  # the configuration in YAML, as it goes into every checkpoint
    check_stop: Callable[[], None]  # raises `Interrupted` after a request to stop
    base_checksum: str | None  # of the frozen weights below adapters
    recipe: str | None  # fingerprint of the source of a recipe of the user's own
    hosts: Hosts = ALONE


@dataclasses.dataclass(frozen=True)
class Boundary:
    """The progress between two updates, as a checkpoint stores it.

    Attributes:
      update: number of RL updates made.
      base: checksum of the frozen weights below adapters.
      config: the resolved configuration, in YAML.
      recipe: fingerprint of the source of a recipe of the user's own.
      record: the run's totals at that moment.
      seconds: wall seconds by phase.
      ledger: progress of the groups (`Ledger.cut`).
      trajectories: episodes that are finished and not consumed.
    """

    update: int = 0
    base: str | None = None
    config: str = ""
    recipe: str | None = None
    record: RunRecord = dataclasses.field(default_factory=RunRecord)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    ledger: dict[str, Any] = dataclasses.field(default_factory=dict)
    trajectories: list[Trajectory] = dataclasses.field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Convert everything except the trajectories to JSON types; `from_restored` reads it back."""
        return {
            "update": self.update,
            "base": self.base,
            "config": self.config,
            "recipe": self.recipe,
            "record": self.record.as_json(),
            "seconds": self.seconds,
            "ledger": self.ledger,
        }

    @classmethod
    def from_restored(cls, restored: Restored) -> Boundary:
        """Rebuild the boundary at which a checkpoint was written."""
        values = restored.progress
        record = RunRecord.from_json(values["record"])
        return cls(**{**values, "record": record, "trajectories": restored.trajectories})


@dataclasses.dataclass
class RunState:
    """The changing state of a run.

    Attributes:
      state: parameters, optimizer and step; donated to every update.
      reference: frozen reference of the KL term; ``{}`` stands for the base, None for no reference.
      update: number of RL updates made.
      record: the run's totals.
      boundary: the progress at the last update boundary.
      marked: optimizer steps made at that boundary; None before the first. A state with another number is
        not the boundary's.
      saved: the progress of the newest checkpoint on disk.
      saved_at: the monotonic clock at that checkpoint, or at the start.
      compiled: number of programs compiled by the end of the warm-up.
    """

    state: TrainState
    reference: Params | None = None
    update: int = 0
    record: RunRecord = dataclasses.field(default_factory=RunRecord)
    boundary: Boundary = dataclasses.field(default_factory=Boundary)
    compiled: int = 0
    marked: int | None = None
    saved: dict[str, Any] | None = None
    saved_at: float = dataclasses.field(default_factory=time.monotonic)


# ------------------------------------------------------------------------------------------- opening


def open_run(
    config: Config,
    run_dir: Path,
    checkpoints: Checkpoints,
    pool: EnvPool,
    *,
    progress: Progress,
    events: EventLog,
    compiles: CompileCounter,
    stop: StopRequest,
    is_resumed: bool,
    step: int | None = None,
    hosts: Hosts = ALONE,
) -> tuple[Parts, RunState]:
    """Build every part, compile every program, and restore the newest checkpoint, or ``step``, on resume.

    Raises:
      Interrupted: the run was asked to stop while programs were compiled.
      ConfigError: the environment has no such split.
      CheckpointError: on resume, no checkpoint can be used.
    """
    clock = PhaseClock()
    check_splits(config, pool, hosts)
    with clock.phase("start"):
        language = _open_language(config, run_dir, hosts, is_resumed=is_resumed)
        # Programs that span hosts are started by all, so a stop waits for the first agreement after them.
        check = stop.check if hosts.num == 1 else _go_on_always
        model = make_model(config, language.tokenizer)
        shape = make_batch_shape(config)
        counted = functools.partial(progress.counting, check)
        learner, schedule, state = start_learner(config, model, shape, counted)
        build = functools.partial(make_sampler, num_hosts=hosts.num, tell=events.tell, check=stop.check)
        engine = build(config, model, language.tokenizer, learner.base)
        if isinstance(engine, Engine):  # nothing of a server is compiled here
            warm_up_engine(engine, state.params, counted)
        progress.close()
        rollout = make_rollout(config, engine, pool, language, hosts)
        first = engine.config.slots  # the engine of training has the handles below
        evaluator = make_evaluator(config, engine, pool, language, first_handle=first, hosts=hosts)
    announce_model(config, run_dir, learner, language, state.params, say=progress.message, hosts=hosts)
    announce_length(config, config.rollout.max_tokens, say=progress.message)
    announce_rows(config, run_dir, language, say=progress.message, hosts=hosts)
    base_checksum = None if learner.base is None else checksum(learner.base)
    entry_point = config.algorithm.entry_point
    recipe = None if entry_point is None else source_hash(entry_point)
    if is_resumed:
        del state  # its memory is for the one that is read
        restored = restore_state(config, checkpoints, learner, step)
        check_base(restored.progress.get("base"), base_checksum)
        run = _go_on(restored, rollout, clock, hosts)
        events.update = run.update
        run.reference = _find_reference(config, run, checkpoints, learner)
        progress.message(f"resumed at update {run.update} of {config.train.updates}")
        if (saved := restored.progress.get("config")) and run.record.phase == "rl":
            tell_other_length(config, saved, int(run.state.step), say=progress.message)
        if restored.progress.get("recipe") not in (None, recipe):
            tell_other_recipe(progress, events, str(entry_point), run.update)
    else:  # also what is saved before the first boundary can be gone on from
        run = RunState(state, boundary=Boundary(base=base_checksum, config=config.to_yaml(), recipe=recipe))
    if config.train.max_lag and hosts.num == 1:
        rollout.recorder = open_recorder(run_dir, run.update, is_resumed=is_resumed)
    # The line of an update that was stopped before its line is written again.
    resume_at = run.update + (run.record.unlogged is None) if is_resumed else None
    log = _open_log(config, run_dir, progress, hosts, resume_at)
    parts = Parts(
        config=config,
        run_dir=run_dir,
        language=language,
        engine=engine,
        learner=learner,
        shape=shape,
        schedule=schedule,
        rollout=rollout,
        evaluator=evaluator,
        checkpoints=checkpoints,
        progress=progress,
        events=events,
        log=log,
        clock=clock,
        compiles=compiles,
        should_stop=stop,
        settings=config.to_yaml(),
        check_stop=stop.check,
        base_checksum=base_checksum,
        recipe=recipe,
        hosts=hosts,
    )
    return parts, run


def _open_log(
    config: Config, run_dir: Path, progress: Progress, hosts: Hosts, resume_at: int | None
) -> MetricsLog:
    return MetricsLog(
        run_dir,
        trackers=open_trackers(config, run_dir, resume_at=resume_at) if hosts.is_first else (),
        resume_at=resume_at,
        warn=progress.message,
        is_written=hosts.is_first,
    )


def _open_language(config: Config, run_dir: Path, hosts: Hosts, *, is_resumed: bool) -> Language:
    """Build the run's language, and keep its tokenizer in the folder from the start on."""
    saved = run_dir / "tokenizer"
    language = make_language(config, saved if is_resumed else None)
    if not is_resumed and hosts.is_first:
        language.tokenizer.save(saved)
    return language


def start_learner(
    config: Config, model: DecoderConfig, shape: BatchShape, counted: Counted
) -> tuple[Learner, optax.Schedule, TrainState]:
    """Build the learner, compile its programs, and make the learning-rate schedule and the first state."""
    optimizer, schedule = make_rl_optimizer(config)
    mesh = make_mesh(**vars(config.mesh), devices=learner_devices(config))
    learner = make_learner(
        model,
        make_algorithm_from(config),
        optimizer,
        mesh,
        micro_rows=shape.micro_rows,
        temperature=config.rollout.temperature,
        token_filter=filter_of(config.rollout),
        has_reference=needs_reference(config),
        max_kl=math.inf if config.train.max_kl is None else config.train.max_kl,
        base=make_base(config, model, mesh),
        shares_prefix=shape.shares_prefix,
    )
    empty, _ = make_batch([], shape, seed=(0,))
    # The warm-up donates its state, so it gets a spare one.
    spare = init_state(jax.random.key(config.seed), model, optimizer, learner.shardings)
    reference: Params | None = {} if has_base_reference(config) else None
    learner.warm_up(
        spare, learner.put(empty), reference, check=counted("compiling the learner", learner.num_programs)
    )
    params = make_params(config, model, learner.shardings.params)
    state = restart_optimizer(params, optimizer, learner.shardings)
    schedule = jax.jit(schedule)
    schedule(state.step)  # compiled with the rest
    return learner, schedule, state


def warm_up_engine(engine: Engine, params: Params, counted: Counted) -> None:
    """Compile the engine's programs; the weights of a run are published to it later."""
    engine.load(params, -1)
    engine.warm_up(counted("compiling the engine", engine.config.num_programs))
    engine.free()


# ------------------------------------------------------------------------------- saving and restoring


def has_begun(run_dir: Path, checkpoints: Checkpoints) -> bool:
    """Return whether a run has a checkpoint or a line of metrics; without either it starts anew."""
    log = run_dir / "metrics.jsonl"
    return bool(checkpoints.steps) or (log.exists() and log.stat().st_size > 0)


def _go_on_always() -> None:
    """Do not stop here."""


def _go_on(restored: Restored, rollout: RolloutThread, clock: PhaseClock, hosts: Hosts) -> RunState:
    """Make the state at the boundary of a checkpoint; set the ledger and the clock to the same point."""
    boundary = Boundary.from_restored(restored)
    clock.add(boundary.seconds)
    # A copy, because the run changes its record while the boundary must keep the old totals.
    rollout.restore(*take_share(boundary.ledger, boundary.trajectories, hosts.index, hosts.num))
    record = copy.deepcopy(boundary.record)
    return RunState(
        restored.state,
        update=boundary.update,
        record=record,
        boundary=boundary,
        marked=int(restored.state.step),
        saved=boundary.as_json(),
    )


def _find_reference(
    config: Config, run: RunState, checkpoints: Checkpoints, learner: Learner
) -> Params | None:
    """Load the reference of a resumed run; None where there is none, or none yet."""
    if has_base_reference(config):
        return {}
    if needs_reference(config) and run.record.phase == "rl":
        return checkpoints.load_reference(learner.shardings.params, run.state.params)
    return None


def has_base_reference(config: Config) -> bool:
    """Return whether the reference is the frozen base: the adapters are not trained before RL."""
    return needs_reference(config) and config.model.lora.rank > 0 and config.sft.updates == 0


def copy_reference(config: Config, params: Params) -> Params | None:
    """Return the reference that starts from these weights: a copy, ``{}`` for the base, None for none."""
    if has_base_reference(config):
        return {}
    return jax.tree.map(lambda leaf: leaf.copy(), params) if needs_reference(config) else None


def freeze_reference(parts: Parts, run: RunState) -> None:
    """Make the current policy, at the start of RL, the reference of the KL term, if there is one.

    With adapters, only the adapters are copied, or nothing where the base alone is the reference.
    """
    run.reference = copy_reference(parts.config, run.state.params)
    if run.reference:
        parts.checkpoints.save_reference(run.reference)
