"""The parts of a run: how they are put together, saved, and restored."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import optax

from empg_jax.assembly import (
    Language,
    make_algorithm_from,
    make_batch_shape,
    make_collector,
    make_engine,
    make_group_filter,
    make_language,
    make_model,
    needs_reference,
)
from empg_jax.checkpoint import Checkpoints, Restored, check_base
from empg_jax.config_text import ConfigError
from empg_jax.evaluate import Evaluator
from empg_jax.learner.fingerprint import TEXT, checksum, text_logprob
from empg_jax.learner.state import TrainState, init_state, make_optimizer, restart_optimizer, state_shapes
from empg_jax.learner.update import Learner, make_learner
from empg_jax.metrics import MetricsLog
from empg_jax.parallel.mesh import make_mesh
from empg_jax.plan import compute_plan
from empg_jax.replay.batching import BatchShape, make_batch
from empg_jax.replay.buffer import ReplayBuffer
from empg_jax.report.events import EventLog
from empg_jax.report.plan import as_line, device_memory
from empg_jax.report.progress import Progress
from empg_jax.report.runinfo import add_run_info
from empg_jax.rollout.engine import Engine
from empg_jax.rollout.pool import EnvPool
from empg_jax.rollout.source import GroupSource, TaskOrder
from empg_jax.runtime import CompileCounter, PhaseClock, StopRequest
from empg_jax.types import Params
from empg_jax.weights import make_base, make_params

if TYPE_CHECKING:
    from empg_jax.config import Config


@dataclasses.dataclass
class Run:
    """The parts of a run that its phases share. Mutable state: ``state``, ``update`` and ``record``."""

    config: Config
    run_dir: Path
    language: Language
    engine: Engine
    learner: Learner
    shape: BatchShape
    schedule: optax.Schedule
    source: GroupSource
    evaluator: Evaluator
    checkpoints: Checkpoints
    progress: Progress
    events: EventLog
    log: MetricsLog
    clock: PhaseClock
    compiles: CompileCounter
    should_stop: StopRequest
    state: TrainState
    reference: Params | None
    base_checksum: str | None  # of the frozen weights below adapters
    update: int = 0
    record: dict[str, Any] = dataclasses.field(default_factory=dict)  # goes into summary.json
    boundary: dict[str, Any] = dataclasses.field(default_factory=dict)  # progress at the last update boundary
    compiled: int = 0  # programs compiled when the warm-up ended


def open_run(
    config: Config,
    run_dir: Path,
    checkpoints: Checkpoints,
    pool: EnvPool,
    progress: Progress,
    compiles: CompileCounter,
    stop: StopRequest,
    is_resumed: bool,
    events: EventLog,
) -> Run:
    """Build every part, compile every program, and restore the newest checkpoint on resume."""
    clock = PhaseClock()
    with clock.phase("start"):
        progress.message(f"run {run_dir}")
        saved_tokenizer = run_dir / "tokenizer"
        language = make_language(config, saved_tokenizer if is_resumed else None)
        if not is_resumed:
            language.tokenizer.save(saved_tokenizer)
        model = make_model(config, language.tokenizer)
        progress.message(as_line(compute_plan(config, model), device_memory()))
        shape = make_batch_shape(config)
        optimizer, schedule = make_rl_optimizer(config)
        mesh = make_mesh(**vars(config.mesh))
        base = make_base(config, model, mesh)
        learner = make_learner(
            model,
            make_algorithm_from(config),
            optimizer,
            mesh,
            micro_rows=shape.micro_rows,
            temperature=config.rollout.temperature,
            has_reference=needs_reference(config),
            max_kl=math.inf if config.train.max_kl is None else config.train.max_kl,
            base=base,
        )
        empty, _ = make_batch([], shape, seed=(0,))
        state = init_state(jax.random.key(config.seed), model, optimizer, learner.shardings)
        learner.warm_up(state, learner.put(empty), {} if has_base_reference(config) else None)
        schedule = jax.jit(schedule)
        params = make_params(config, model, learner.shardings.params)
        state = restart_optimizer(params, optimizer, learner.shardings)
        schedule(state.step)  # compiled with the rest
        engine = make_engine(config, model, language.tokenizer)
        eval_engine = make_engine(config, model, language.tokenizer, temperature=config.eval.temperature)
        if base is not None:
            engine.base = eval_engine.base = engine.place(base)
        for each in (engine, eval_engine):
            each.load(state.params, 0)
            each.warm_up()
        buffer = ReplayBuffer(group_size=config.rollout.group_size, max_lag=config.train.max_lag)
        source = GroupSource(
            make_collector(config, engine, pool, language, stream=0),
            buffer,
            TaskOrder(config.env.split, _num_tasks(config, pool), config.seed),
            groups_per_batch=config.rollout.tasks_per_update,
            min_group_size=config.rollout.min_group_size,
            group_timeout=config.rollout.episode_timeout,
            group_filter=make_group_filter(config),
            tell=events.tell,
        )
        evaluator = Evaluator(config, pool, language, eval_engine, first_handle=engine.config.slots)
    run = Run(
        config=config,
        run_dir=run_dir,
        language=language,
        engine=engine,
        learner=learner,
        shape=shape,
        schedule=schedule,
        source=source,
        evaluator=evaluator,
        checkpoints=checkpoints,
        progress=progress,
        events=events,
        log=None,  # type: ignore[arg-type]  # opened below, once it is known where to go on
        clock=clock,
        compiles=compiles,
        should_stop=stop,
        state=state,
        reference=None,
        base_checksum=None if base is None else checksum(base),
    )
    if config.model.path is not None:
        announce_model(run)
    if is_resumed:
        _resume(run)
    run.log = MetricsLog(
        run_dir,
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
        resume_at=run.update + 1 if is_resumed else None,
    )
    return run


def announce_model(run: Run) -> None:
    """Say, and note in the run's folder, what the loaded model makes of a fixed text."""
    ids = run.language.tokenizer.encode(TEXT)
    model, mesh, base = run.learner.model, run.learner.mesh, run.learner.base
    value = round(text_logprob(run.state.params, model, ids, mesh, base), 4)
    run.progress.message(f"{run.config.model.path}: {value:.4f} nats per token on a fixed text")
    add_run_info(run.run_dir, {"model": {"path": run.config.model.path, "text_logprob": value}})


def has_begun(run_dir: Path, checkpoints: Checkpoints) -> bool:
    """Whether a run holds anything to go on from; one killed before its first checkpoint does not."""
    log = run_dir / "metrics.jsonl"
    return bool(checkpoints.steps) or (log.exists() and log.stat().st_size > 0)


def _resume(run: Run) -> None:
    restored = restore_state(run.config, run.checkpoints, run.learner)
    saved = restored.progress
    run.events.update = saved["update"]
    check_base(saved.get("base"), run.base_checksum)
    run.state, run.update, run.record = restored.state, saved["update"], saved["record"]
    for name, seconds in saved["seconds"].items():
        run.clock.seconds[name] = run.clock.seconds.get(name, 0.0) + seconds
    run.source.restore(saved["source"], restored.trajectories)
    if has_base_reference(run.config):
        run.reference = {}
    elif needs_reference(run.config) and run.record.get("phase") == "rl":
        run.reference = run.checkpoints.load_reference(run.learner.shardings.params, run.state.params)
    run.progress.message(f"resumed at update {run.update} of {run.config.train.updates}")


def has_base_reference(config: Config) -> bool:
    """Whether the reference is the frozen base itself: adapters that nothing has trained before RL."""
    return needs_reference(config) and config.model.lora.rank > 0 and config.sft.updates == 0


def freeze_reference(run: Run) -> None:
    """Make the policy as it is now, at the start of RL, the reference of the KL term, if there is one.

    With adapters this copies adapters, or nothing at all where the base alone is the reference.
    """
    if has_base_reference(run.config):
        run.reference = {}
    elif needs_reference(run.config):
        run.reference = jax.tree.map(lambda leaf: leaf.copy(), run.state.params)
        run.checkpoints.save_reference(run.reference)


def _num_tasks(config: Config, pool: EnvPool) -> int:
    if config.env.split not in pool.splits:
        raise ConfigError(
            f"env.split={config.env.split} does not exist; the environment has {', '.join(pool.splits)}"
        )
    return pool.splits[config.env.split]


def mark_boundary(run: Run) -> None:
    """Remember the progress between two updates: what a checkpoint of this state must say."""
    run.boundary = {
        "progress": {
            "update": run.update,
            "base": run.base_checksum,
            "record": dict(run.record),
            "seconds": dict(run.clock.seconds),
            "source": run.source.snapshot(),
        },
        "trajectories": run.source.buffer.contents(),
    }


def save(run: Run) -> None:
    """Write a checkpoint of the last update boundary."""
    with run.clock.phase("checkpoint"):
        run.checkpoints.save(run.update, run.state, **run.boundary)


def restore_state(config: Config, checkpoints: Checkpoints, learner: Learner) -> Restored:
    """The newest usable checkpoint of a run."""
    optimizer, _ = make_rl_optimizer(config)
    return checkpoints.restore(learner.shardings, state_shapes(learner.model, optimizer))


def make_rl_optimizer(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of the RL phase; its schedule counts optimizer steps."""
    t = config.train
    steps = t.num_minibatches * t.epochs
    return make_optimizer(
        learning_rate=t.learning_rate,
        final_learning_rate=t.final_learning_rate,
        total_steps=t.updates * steps,
        schedule=t.schedule,
        warmup_steps=t.warmup_updates * steps,
        beta1=t.beta1,
        beta2=t.beta2,
        weight_decay=t.weight_decay,
        grad_clip=t.grad_clip,
    )
