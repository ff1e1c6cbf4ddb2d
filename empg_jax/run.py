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
    make_params,
    needs_reference,
)
from empg_jax.checkpoint import Checkpoints, Restored
from empg_jax.config_text import ConfigError
from empg_jax.evaluate import Evaluator
from empg_jax.learner.state import TrainState, init_state, make_optimizer, restart_optimizer, state_shapes
from empg_jax.learner.update import Learner, make_learner
from empg_jax.metrics import MetricsLog
from empg_jax.parallel.mesh import make_mesh
from empg_jax.replay.batching import BatchShape, make_batch
from empg_jax.replay.buffer import ReplayBuffer
from empg_jax.report.progress import Progress
from empg_jax.rollout.engine import Engine
from empg_jax.rollout.pool import EnvPool
from empg_jax.rollout.source import GroupSource, TaskOrder
from empg_jax.runtime import CompileCounter, PhaseClock, StopRequest
from empg_jax.types import Params

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
    log: MetricsLog
    clock: PhaseClock
    compiles: CompileCounter
    should_stop: StopRequest
    state: TrainState
    reference: Params | None
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
        shape = make_batch_shape(config)
        optimizer, schedule = make_rl_optimizer(config)
        learner = make_learner(
            model,
            make_algorithm_from(config),
            optimizer,
            make_mesh(**vars(config.mesh)),
            micro_rows=shape.micro_rows,
            temperature=config.rollout.temperature,
            has_reference=needs_reference(config),
            max_kl=math.inf if config.train.max_kl is None else config.train.max_kl,
        )
        empty, _ = make_batch([], shape, seed=(0,))
        state = init_state(jax.random.key(config.seed), model, optimizer, learner.shardings)
        learner.warm_up(state, learner.put(empty))
        schedule = jax.jit(schedule)
        params = make_params(config, model, learner.shardings.params)
        state = restart_optimizer(params, optimizer, learner.shardings)
        schedule(state.step)  # compiled with the rest
        engine = make_engine(config, model, language.tokenizer)
        eval_engine = make_engine(config, model, language.tokenizer, temperature=config.eval.temperature)
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
        log=None,  # type: ignore[arg-type]  # opened below, once it is known where to go on
        clock=clock,
        compiles=compiles,
        should_stop=stop,
        state=state,
        reference=None,
    )
    if is_resumed:
        _resume(run)
    run.log = MetricsLog(
        run_dir,
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
        resume_at=run.update + 1 if is_resumed else None,
    )
    return run


def has_begun(run_dir: Path, checkpoints: Checkpoints) -> bool:
    """Whether a run holds anything to go on from; one killed before its first checkpoint does not."""
    log = run_dir / "metrics.jsonl"
    return bool(checkpoints.steps) or (log.exists() and log.stat().st_size > 0)


def _resume(run: Run) -> None:
    restored = restore_state(run.config, run.checkpoints, run.learner)
    saved = restored.progress
    run.state, run.update, run.record = restored.state, saved["update"], saved["record"]
    for name, seconds in saved["seconds"].items():
        run.clock.seconds[name] = run.clock.seconds.get(name, 0.0) + seconds
    run.source.restore(saved["source"], restored.trajectories)
    if needs_reference(run.config) and run.record.get("phase") == "rl":
        run.reference = run.checkpoints.load_reference(run.learner.shardings.params, run.state.params)
    run.progress.message(f"resumed at update {run.update} of {run.config.train.updates}")


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
