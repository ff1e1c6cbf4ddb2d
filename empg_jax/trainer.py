"""Training: warm start, then the loop of rollout, credit and update. `rl_loop` is the page to read first."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from empg_jax.algorithms.anchors import join_alike
from empg_jax.errors import RunError, Stopped
from empg_jax.learner.batching import Layout, find_tokens, make_batch
from empg_jax.learner.state import restart_optimizer
from empg_jax.plan.explain import as_line, device_memory
from empg_jax.plan.memory import compute_plan
from empg_jax.report.events import EventLog
from empg_jax.report.progress import Progress
from empg_jax.report.record import PanelResult
from empg_jax.report.results import describe_update, dump_batch, write_results
from empg_jax.report.rollouts import drop_rollouts, is_due, write_rollouts
from empg_jax.rollout.evaluator import Evaluation
from empg_jax.rollout.incidents import IncidentMeter
from empg_jax.rollout.record import describe_episodes, describe_tokens
from empg_jax.rollout.source import Interrupted
from empg_jax.run.assembly import describe_algorithm, make_language, make_pool, make_rl_optimizer
from empg_jax.run.checkpoint import Checkpoints
from empg_jax.run.folder import create_run_dir, write_run_info
from empg_jax.run.parts import (
    Parts,
    RunState,
    freeze_reference,
    has_begun,
    mark_boundary,
    open_run,
    restore_state,
    save,
)
from empg_jax.run.process import CompileCounter, StopRequest
from empg_jax.run.weights import check_model
from empg_jax.sft.examples import Examples, gather_examples
from empg_jax.sft.phase import train_on_examples
from empg_jax.types import Batch, Credit, Scores, Trajectory

if TYPE_CHECKING:
    from empg_jax.config import Config

# Sampler and learner run the same model: a larger mean gap of their log-probs means that one is wrong.
GAP_LIMIT = 0.05
GAP_CHECK_EVERY = 25
MAX_ROLLBACKS = 3


class TrainingError(RunError):
    """Training cannot go on; the message says why and what was kept."""


def train(config: Config, *, resume: Path | None = None) -> Path:
    """Run a configuration to its end, or go on with a run.

    Args:
      config: the resolved configuration; on resume, the run's own.
      resume: folder of the run to go on with.

    Returns:
      The run's folder.

    Raises:
      ConfigError: the model cannot be made as configured; nothing was written.
      TrainingError: NaN in loss or gradient, or sampler and learner disagree.
      CheckpointError: a checkpoint could not be written, or none can be read on resume.
      PoolError: the environments keep failing.
      Stopped: SIGINT or SIGTERM; a checkpoint was written.
    """
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(config.log.progress))
        progress.message(describe_algorithm(config))
        for note in getattr(config, "notes", ()):  # a resolved file read without pydantic has none
            progress.message(f"note: {note}")
        # Bad models and data are told before a folder is made and a model is built.
        model = check_model(config)
        examples = None
        if config.sft.data is not None and resume is None:
            examples = gather_examples(config, make_language(config), progress)
        run_dir = resume if resume is not None else create_run_dir(config)
        progress.message(f"run {run_dir}")
        progress.message(as_line(compute_plan(config, model), device_memory()))
        stop = stack.enter_context(StopRequest())
        compiles = stack.enter_context(CompileCounter())
        write_run_info(run_dir, config, resumed=resume is not None)
        directory = Path(config.checkpoint.dir or run_dir / "checkpoints")
        events = stack.enter_context(EventLog(run_dir))
        warn = functools.partial(tell_passed_over, progress, events)
        checkpoints = Checkpoints(directory, keep=config.checkpoint.keep, warn=warn)
        stack.callback(checkpoints.close)
        pool = stack.enter_context(make_pool(config, events.tell))
        is_resumed = resume is not None and has_begun(run_dir, checkpoints)
        if resume is not None and not is_resumed:
            progress.message("the run ended before its first checkpoint: it begins anew")
        parts, run = open_run(
            config,
            run_dir,
            checkpoints,
            pool,
            progress=progress,
            events=events,
            compiles=compiles,
            stop=stop,
            is_resumed=is_resumed,
        )
        stack.callback(parts.log.close)
        drop_rollouts(run_dir, after=run.update)
        try:
            final = None
            if run.record.phase == "sft":
                final = warm_start_phase(parts, run, examples)
            rl_loop(parts, run)
            if final is None or config.train.updates:  # a warm start alone was evaluated at its end
                final = evaluate(parts, run, "after")
        except Interrupted:
            events.tell("stop_requested", signal=stop.signum)
            save(parts, run)
            checkpoints.wait()
            raise Stopped(stop.signum, run_dir) from None
        run.record.recompiles_after_warmup = compiles.count - run.compiled
    decode = parts.language.tokenizer.decode
    write_results(run_dir, run.record, parts.clock.seconds, final.trajectories, decode, config)
    return run_dir


def tell_passed_over(progress: Progress, events: EventLog, line: str) -> None:
    """Tell the person and the diary of a checkpoint that could not be read."""
    progress.message(line)
    events.tell("checkpoint_skipped", detail=line)


def run_sft(config: Config) -> Path:
    """The warm start alone, as a run: the same folder and checkpoints as training with no RL update."""
    return train(config.model_copy(update={"train": config.train.model_copy(update={"updates": 0})}))


def rl_loop(parts: Parts, run: RunState) -> None:
    """Rollout, score, credit, update, publish; until ``train.updates``."""
    config, learner = parts.config, parts.learner
    parts.progress.phase("RL", config.train.updates, "updates", done=run.update)
    run.compiled = parts.compiles.count
    incidents = IncidentMeter(parts.source)
    while run.update < config.train.updates:
        began = Beginning(time.monotonic(), parts.compiles.count, dict(parts.clock.seconds))
        parts.events.update = run.update + 1
        mark_boundary(parts, run)
        with parts.clock.phase("rollout"):
            parts.engine.load(run.state.params, run.update)
            trajectories = parts.source.collect(run.update, parts.should_stop)
        with parts.clock.phase("update"):
            host_batch, layout = split_batch(parts, run, trajectories, epoch=0)
            batch = learner.put(host_batch)
            own_scores, measured = score(parts, run, batch, layout)
            scores = choose_scores(parts, batch, own_scores)
            credit = learner.credit(batch, scores)
            first = Pass(host_batch, layout, batch, scores, credit)
            steps = [
                s for each in passes(parts, run, trajectories, first) for s in make_steps(parts, run, each)
            ]
            credit_metrics, steps = jax.device_get((credit.metrics, steps))
            measured |= measure_drift(parts, run, batch, layout, own_scores)
        run.update += 1
        check_steps(parts, run, steps, host_batch)
        parts.source.collector.settle()  # new weights are taken up at a turn boundary
        write_episodes(parts, run, trajectories, first)
        values = describe_update(
            trajectories,
            layout,
            parts.shape,
            version=run.update - 1,
            engine=parts.engine.take_stats(),
            credit=credit_metrics,
            steps=steps,
            seconds=time.monotonic() - began.time,
        )
        values |= measured | parts.source.metrics
        finish_update(parts, run, trajectories, values=values, began=began, incidents=incidents)


@dataclasses.dataclass(frozen=True)
class Beginning:
    """Readings of the clock and the counters when an update began."""

    time: float
    compiled: int
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass over a global batch: how its rows are split, and their credit."""

    host: Batch
    layout: Layout
    batch: Batch  # the same on the mesh
    scores: Scores
    credit: Credit


def split_batch(
    parts: Parts, run: RunState, trajectories: Sequence[Trajectory], *, epoch: int
) -> tuple[Batch, Layout]:
    """Build the global batch; every update and epoch deals its trajectories to other optimizer steps."""
    algorithm = parts.config.algorithm
    return make_batch(
        join_alike(trajectories, algorithm.anchor_similarity),
        parts.shape,
        seed=(parts.config.seed, run.update, epoch),
        gamma=algorithm.turn_gamma,
    )


def passes(parts: Parts, run: RunState, trajectories: Sequence[Trajectory], first: Pass) -> Iterator[Pass]:
    """Yield the pass of every epoch: the given one, then the same trajectories split anew.

    Scores stay those of the policy before the update; only their place in the batch changes.
    """
    yield first
    for epoch in range(1, parts.config.train.epochs):
        host, layout = split_batch(parts, run, trajectories, epoch=epoch)
        batch = parts.learner.put(host)
        scores = parts.learner.rearrange(first.scores, find_tokens(first.host, host))
        yield Pass(host, layout, batch, scores, parts.learner.credit(batch, scores))


def make_steps(parts: Parts, run: RunState, each: Pass) -> Iterator[dict[str, Any]]:
    """Make the optimizer steps of a pass; yield the metrics of each."""
    for start, stop in each.layout.bounds:
        run.state, metrics = parts.learner.update(
            run.state, each.batch, each.scores, each.credit, np.int32(start), np.int32(stop)
        )
        yield metrics


def write_episodes(parts: Parts, run: RunState, trajectories: Sequence[Trajectory], first: Pass) -> None:
    """Write the episodes of the update with their credit, where that is due."""
    log = parts.config.log
    if not is_due(run.update, every=log.rollouts_every, last=parts.config.train.updates):
        return
    table, tokens = jax.device_get(first.credit.turns), None
    if log.rollouts_tokens:
        entropies, advantages = jax.device_get((first.scores.entropies, first.credit.advantages))
        tokens = describe_tokens(trajectories, first.host, entropies, advantages)
    records = describe_episodes(trajectories, table, update=run.update, tokens=tokens)
    write_rollouts(parts.run_dir, run.update, records)


def finish_update(
    parts: Parts,
    run: RunState,
    trajectories: Sequence[Trajectory],
    *,
    values: dict[str, float],
    began: Beginning,
    incidents: IncidentMeter,
) -> None:
    """Count the episodes of an update, evaluate, log and write a checkpoint, where these are due."""
    config = parts.config
    is_last = run.update == config.train.updates
    values |= {
        "learning_rate": float(parts.schedule(run.state.step)),
        "recompiles": float(parts.compiles.count - began.compiled),
    }
    run.record.count(trajectories, parts.source.outcomes)
    if config.eval.every and run.update % config.eval.every == 0 and not is_last:
        values |= evaluate(parts, run, "during").metrics
    for name, seconds in parts.clock.seconds.items():
        if (spent := seconds - began.seconds.get(name, 0.0)) > 0:
            values[f"seconds_{name}"] = spent
    if run.update % config.log.every == 0:
        parts.log.write(run.update, values | incidents.take())
    parts.progress.advance(1, values)
    if run.update % config.checkpoint.every == 0 or is_last:
        mark_boundary(parts, run)
        save(parts, run)


def score(
    parts: Parts, run: RunState, batch: Batch, layout: Layout
) -> tuple[Scores | None, dict[str, float]]:
    """The learner's own pass over a batch, where one is due, and its gap to the engine.

    It is due where the algorithm needs what no engine records (entropies by the learner, the reference's
    log-probs, the critic's values), where a drift is measured, and now and then to check the engine. The gap
    is measured on data of the learner's own version.

    Raises:
      TrainingError: the gap is beyond the gate.
    """
    config = parts.config
    is_needed = config.algorithm.entropy_source == "learner" or parts.learner.needs_score
    if not is_needed and run.update % GAP_CHECK_EVERY and not drift_is_due(parts, run):
        return None, {}
    scores = score_pass(parts, run, batch, layout)
    if config.train.max_lag > 0:
        return scores, {}
    mean, largest = (float(gap) for gap in parts.learner.logprob_gap(batch, scores))
    if mean > GAP_LIMIT:
        raise TrainingError(
            f"sampler and learner disagree: the mean log-prob difference is {mean:.3g} at update "
            f"{run.update}, limit {GAP_LIMIT:g}. They run the same weights, so this is a numerical fault "
            f"(model.dtype={config.model.dtype})"
        )
    return scores, {"logprob_gap": mean, "logprob_gap_max": largest}


def score_pass(parts: Parts, run: RunState, batch: Batch, layout: Layout) -> Scores:
    """Scores of a batch under the current weights (and the reference's)."""
    reference = run.state.params if run.reference is None else run.reference
    return parts.learner.score(run.state.params, reference, batch, np.int32(layout.bounds[-1][1]))


def choose_scores(parts: Parts, batch: Batch, own: Scores | None) -> Scores:
    """What credit and loss work with: the learner's scores, or the engine's where it is their source."""
    if own is not None and parts.config.algorithm.entropy_source == "learner":
        return own
    recorded = parts.learner.recorded_scores(batch)
    if own is None or not parts.learner.needs_score:
        return recorded
    return dataclasses.replace(own, old_logprobs=recorded.old_logprobs, entropies=recorded.entropies)


def drift_is_due(parts: Parts, run: RunState) -> bool:
    """Whether the entropy is measured before and after this update."""
    return parts.config.log.drift_every > 0 and run.update % parts.config.log.drift_every == 0


def measure_drift(
    parts: Parts, run: RunState, batch: Batch, layout: Layout, before: Scores | None
) -> dict[str, float]:
    """How the update changed the mean entropy of the batch's sampled tokens, where that is due."""
    if before is None or not drift_is_due(parts, run):
        return {}
    after = score_pass(parts, run, batch, layout)
    return {"entropy_drift_measured": float(parts.learner.entropy_drift(batch, before, after))}


def check_steps(parts: Parts, run: RunState, steps: list[dict[str, Any]], batch: Batch) -> None:
    """Act on optimizer steps that were left out: loss or gradient not finite, or too far from the old policy.

    Raises:
      TrainingError: the configuration says stop, or rolling back did not help.
    """
    train = parts.config.train
    guards = (
        ("nonfinite", train.on_nonfinite, "loss or gradient was not finite"),
        ("kl_exceeded", train.on_kl, f"the KL from the old policy was beyond train.max_kl={train.max_kl}"),
    )
    counts = {name: int(sum(float(step[name]) for step in steps)) for name, _, _ in guards}
    if not any(counts.values()):
        run.record.rollbacks_in_a_row = 0
        return
    path = dump_batch(parts.run_dir, run.update, batch)
    for name, policy, why in guards:
        if not counts[name]:
            continue
        what = f"update {run.update}: {why} in {counts[name]} of {len(steps)} optimizer steps; batch: {path}"
        if policy == "rollback":
            run.record.rollbacks_in_a_row += 1
        if policy == "stop" or run.record.rollbacks_in_a_row > MAX_ROLLBACKS:
            parts.checkpoints.wait()
            raise TrainingError(
                f"{what}; those steps changed nothing; checkpoints: {parts.checkpoints.steps}"
            )
        parts.progress.message(f"{what}; {policy}")
        parts.events.tell("steps_left_out", reason=name, steps=counts[name], policy=policy)
        if policy == "rollback":
            parts.events.tell("rollback", reason=name, steps=parts.checkpoints.steps)
            parts.checkpoints.wait()
            run.state = restore_state(parts.config, parts.checkpoints, parts.learner).state


# --------------------------------------------------------------------------------------- other phases


def warm_start_phase(parts: Parts, run: RunState, examples: Examples | None = None) -> Evaluation:
    """Supervised warm start (if configured), the evaluation before RL, and the first checkpoint.

    Args:
      parts: the run's parts.
      run: its state.
      examples: what to learn from; None gathers it.

    Returns:
      The evaluation before RL.
    """
    config = parts.config
    if config.sft.updates:
        train_on_examples(parts, run, examples)
    optimizer, _ = make_rl_optimizer(config)
    run.state = restart_optimizer(run.state.params, optimizer, parts.learner.shardings)
    run.record.phase = "rl"
    freeze_reference(parts, run)
    before = evaluate(parts, run, "before")
    mark_boundary(parts, run)
    save(parts, run)
    parts.checkpoints.wait()  # from here on there is always something to go on from
    return before


def evaluate(parts: Parts, run: RunState, when: str) -> Evaluation:
    """Evaluate the current weights on the held-out panel; ``before`` and ``after`` go into the summary."""
    evaluator, progress = parts.evaluator, parts.progress
    with parts.clock.phase("eval"):
        if when == "during":  # the display stays with the RL phase
            result = evaluator.run(run.state.params, run.update)
        else:
            progress.phase(f"evaluation ({when})", evaluator.num_tasks, "tasks")
            result = evaluator.run(run.state.params, run.update, advance=progress.advance)
    if when != "during":
        run.record.panels[when] = PanelResult(run.update, result.metrics, result.wins)
    progress.message(f"{when}: success {result.metrics['eval_success']:.1%} on {evaluator.num_tasks} tasks")
    return result
