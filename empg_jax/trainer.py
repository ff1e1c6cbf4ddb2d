"""Training: a warm start, then the loop of rollout, credit and update. Read `rl_loop` first."""

from __future__ import annotations

import contextlib
import datetime
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from empg_jax.algorithms.anchors import join_alike
from empg_jax.errors import Interrupted, RunError, Stopped
from empg_jax.learner.batching import Layout, make_batch
from empg_jax.learner.passes import Pass, Scorer, optimize
from empg_jax.parallel.hosts import ALONE, Hosts, joined
from empg_jax.plan.explain import as_line, device_memory
from empg_jax.plan.memory import compute_plan
from empg_jax.plan.whole import whole_lines
from empg_jax.report.events import EventLog
from empg_jax.report.progress import Progress
from empg_jax.report.results import describe_update
from empg_jax.report.tracking import import_trackers
from empg_jax.rollout.evaluator import Evaluation
from empg_jax.rollout.incidents import IncidentMeter, count_incidents
from empg_jax.rollout.thread import Delivery
from empg_jax.run.announcing import say_once
from empg_jax.run.answers import check_answers, with_answers
from empg_jax.run.assembly import asks_for_date, describe_algorithm, make_language
from empg_jax.run.checkpoint import Checkpoints
from empg_jax.run.concluding import conclude_run
from empg_jax.run.consumed import drop_consumed, write_consumed
from empg_jax.run.cpu import cpu_seconds
from empg_jax.run.devices import check_shares
from empg_jax.run.evaluating import evaluate, evaluate_before
from empg_jax.run.folder import checkpoint_dir, create_run_dir, undone_if_refused, write_run_info
from empg_jax.run.guards import check_gap, check_steps
from empg_jax.run.keeping import keep_checkpoints, keep_date, keep_places, keep_texts
from empg_jax.run.leaving import leave
from empg_jax.run.owner import check_owner, note_owner
from empg_jax.run.parts import Parts, RunState, has_begun, open_run
from empg_jax.run.process import CompileCounter, StopRequest, prepare_jax
from empg_jax.run.profiling import Profiler
from empg_jax.run.resuming import check_resume, go_back, keep_evaluation, tell_passed_over
from empg_jax.run.rollouts import drop_rollouts, write_episodes
from empg_jax.run.sampling import check_rollout, make_pool
from empg_jax.run.saving import is_time_to_save, mark_boundary, save, save_after_error
from empg_jax.run.server import closing_sampler
from empg_jax.run.together import (
    add_counts,
    check_store,
    gather_delivery,
    lock_files,
    make_progress,
    share_folder,
    shared_facts,
    without_hosts,
)
from empg_jax.run.weights import check_model
from empg_jax.sft.examples import Examples, gather_examples
from empg_jax.sft.phase import warm_start_phase
from empg_jax.types import Batch, Trajectory

if TYPE_CHECKING:
    from empg_jax.config import Config


def train(config: Config, *, resume: Path | None = None, step: int | None = None) -> Path:
    """Run a configuration to its end, or resume a run.

    Args:
      config: the resolved configuration; on resume, the run's own.
      resume: folder of the run to resume.
      step: the checkpoint to go on from; None takes the newest usable one.

    Returns:
      The run's folder.

    Raises:
      ConfigError: the model cannot be built as configured; nothing was written.
      TrainingError: NaN in loss or gradient, or sampler and learner disagree.
      CheckpointError: a checkpoint could not be written, or none can be read on resume.
      PoolError: the environments keep failing.
      Stopped: SIGINT or SIGTERM; a checkpoint was written, or nothing yet.
    """
    config = keep_texts(config)
    with joined(config.hosts, functools.partial(shared_facts, config, resume, step)) as hosts:
        prepare_jax(config)
        return train_on(hosts, without_hosts(config), resume=resume, step=step)


def train_on(hosts: Hosts, config: Config, *, resume: Path | None, step: int | None) -> Path:
    """Check the run and make its folder, then train in it; as `train`, on hosts that have met."""
    is_resume = resume is not None
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(make_progress(config, hosts))
        check_shares(config, hosts.num)
        # Bad models and data are told before a folder is made and a model is built. A refusal is one message.
        model = check_model(config)
        if resume is None and asks_for_date(config):
            config = keep_date(config, hosts.first("date", lambda: datetime.date.today().isoformat()))
        check_rollout(config, model)
        check_answers(config)
        progress.message(describe_algorithm(config))
        for note in getattr(config, "notes", ()):  # a resolved file read without pydantic has none
            progress.message(f"note: {note}")
        config = keep_places(config, hosts) if resume is None else keep_checkpoints(config, hosts)
        check_store(config, hosts, is_new=resume is None)
        hosts.first("trackers", lambda: list(import_trackers(config)))
        stop = stack.enter_context(StopRequest(hosts.ask_stop if hosts.num > 1 else None))
        hosts.on_stop = stop.set
        examples = None
        if config.sft.data is not None and resume is None:
            try:
                examples = gather_examples(config, make_language(config), progress, check=stop.check)
            except Interrupted:
                raise Stopped(stop.signum, None) from None
        run_dir = share_folder(hosts, lambda: create_run_dir(config) if resume is None else resume)
        hosts.describe_left = lambda: f"start all hosts again with: empg-jax train --resume {run_dir}"
        progress.message(f"run {run_dir}")
        plan = compute_plan(config, model, hosts.num)
        for line in (as_line(plan, device_memory()), *whole_lines(config, model)):
            progress.message(line)
        stack.enter_context(lock_files(config, run_dir, hosts))
        if is_resume:
            check_owner(config, run_dir, hosts)
            check_resume(config, run_dir, step)
        if hosts.is_first and not is_resume:
            stack.enter_context(undone_if_refused(config, run_dir))
        if hosts.is_first:
            note_owner(config, run_dir)
            write_run_info(run_dir, config, resumed=is_resume)
        events = stack.enter_context(EventLog(run_dir, hosts.index))
        stop.arm(
            config.checkpoint.grace,
            functools.partial(leave, run_dir, checkpoint_dir(config, run_dir), events),
        )
        try:
            train_in_folder(
                config, run_dir, examples, progress, events, stop, is_resume=is_resume, step=step, hosts=hosts
            )
        except Interrupted:
            with contextlib.suppress(RunError, ValueError):
                events.tell("stop_requested", signal=stop.signum)
            raise Stopped(stop.signum, run_dir) from None
    return run_dir


def train_in_folder(
    config: Config,
    run_dir: Path,
    examples: Examples | None,
    progress: Progress,
    events: EventLog,
    stop: StopRequest,
    *,
    is_resume: bool,
    step: int | None,
    hosts: Hosts = ALONE,
) -> None:
    """Open the parts of a run, run its phases, and write its results; save before a stop or an error.

    Raises:
      Interrupted: the run was asked to stop; what there was to save is saved.
    """
    with contextlib.ExitStack() as stack:
        compiles = stack.enter_context(CompileCounter())
        warn = functools.partial(tell_passed_over, progress, events)
        directory, keep = checkpoint_dir(config, run_dir), config.checkpoint.keep
        checkpoints = Checkpoints(directory, keep=keep, warn=warn, hosts=hosts)
        checkpoints.recover()
        stack.callback(checkpoints.close)
        pool = stack.enter_context(make_pool(config, say_once(progress.message, events.tell)))
        is_resumed = hosts.first("begun", lambda: is_resume and has_begun(run_dir, checkpoints))
        if is_resume and not is_resumed:
            progress.message("the run ended before its first checkpoint: it begins anew")
        if is_resumed and hosts.is_first:
            keep_evaluation(run_dir, progress.message)
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
            step=step,
            hosts=hosts,
        )
        stack.callback(parts.log.close)
        stack.enter_context(closing_sampler(parts.engine))
        # What could not be read would stay the newest, and be gone on from where it can be read again.
        is_behind = hosts.first("behind", lambda: is_resumed and checkpoints.newest > run.update)
        if step is not None or is_behind:
            go_back(parts, run)
        if hosts.is_first:
            drop_rollouts(run_dir, after=run.update)
            drop_consumed(run_dir, after=run.update)
        try:
            final = run_phases(parts, run, examples)
        except Interrupted:
            save(parts, run)
            checkpoints.wait()
            raise
        except BaseException as error:
            save_after_error(parts, run, error)
            raise
        run.record.recompiles_after_warmup = compiles.count - run.compiled
        checkpoints.wait()  # without its last checkpoint a run is not finished
        if hosts.is_first:  # before the trackers are told of the end, which may take them minutes
            conclude_run(parts, run, final)


def run_sft(config: Config) -> Path:
    """Run the warm start alone: a run with the same folder and checkpoints, but without RL updates."""
    return train(config.model_copy(update={"train": config.train.model_copy(update={"updates": 0})}))


def run_phases(parts: Parts, run: RunState, examples: Examples | None) -> Evaluation:
    """Run what is left of a run: warm start, evaluation, RL, evaluation. Returns the last evaluation."""
    final = None
    if run.record.phase == "sft":
        warm_start_phase(parts, run, examples)
    if run.update == 0 and "before" not in run.record.panels:
        final = evaluate_before(parts, run)
    rl_loop(parts, run)
    if final is None or parts.config.train.updates:  # a warm start alone was evaluated at its end
        final = evaluate(parts, run, "after")
    return final


def rl_loop(parts: Parts, run: RunState) -> None:
    """Repeat publication of weights, rollout, score, credit and update until ``train.updates``.

    The rollout thread plays episodes meanwhile, as far ahead as ``train.max_lag`` allows.
    """
    config, rollout = parts.config, parts.rollout
    scorer = make_scorer(parts)
    unlogged = run.record.unlogged
    parts.progress.phase("RL", config.train.updates, "updates", done=run.update - (unlogged is not None))
    run.compiled = parts.compiles.count
    incidents = begin_meter(parts, run)
    take = functools.partial(rollout.next_batch, parts.check_stop)
    parts.clock.lap()  # what came before, also in earlier attempts, is not of the first update
    if unlogged is not None:
        conclude_update(parts, run, unlogged)
    with rollout, Profiler(config, parts.run_dir) as profiler:
        while run.update < config.train.updates:
            profiler.begin(run.update + 1)
            began, burned, compiled = time.monotonic(), cpu_seconds(), parts.compiles.count
            parts.events.update = run.update + 1
            # Marked before the rollout: a stop while waiting for it saves this state.
            mark_boundary(parts, run)
            with parts.clock.phase("publish"):
                rollout.publish(run.state.params, run.update)
            with parts.clock.phase("rollout"):
                asked = time.monotonic()
                delivery = gather_delivery(parts.hosts, take, parts.should_stop)
                waited = time.monotonic() - asked
                if config.rollout.release:
                    rollout.call(parts.engine.free)
            rate = float(parts.schedule(run.state.step))
            with parts.clock.phase("update"):
                delivery = with_answers(parts, run, scorer, delivery)
                first, steps, measured = update_policy(parts, run, scorer, delivery.trajectories)
            run.update += 1
            check_steps(parts, run, steps, first)
            write_episodes(parts, run.update, delivery.trajectories, first)
            seconds = time.monotonic() - began
            values = describe_update(
                delivery.trajectories,
                first.layout,
                parts.shape,
                version=run.update - 1,
                engine=delivery.engine,
                credit=jax.device_get(first.credit.metrics),
                steps=steps,
                seconds=seconds,
            )
            values |= measured | delivery.metrics | {"recompiles": parts.compiles.count - compiled}
            values["learning_rate"] = rate
            values["learner_idle"] = waited / seconds
            values["cpu_seconds"] = cpu_seconds() - burned
            profiler.end(run.update)
            finish_update(parts, run, delivery, values, incidents)
            del delivery, first  # the next rollout needs their memory


def update_policy(
    parts: Parts, run: RunState, scorer: Scorer, trajectories: Sequence[Trajectory]
) -> tuple[Pass, list[dict[str, Any]], dict[str, float]]:
    """Score the episodes, assign credit and make the optimizer steps.

    Returns:
      The first pass over the batch, the metrics of each optimizer step, and what the scorer measured.
    """
    config, learner = parts.config, parts.learner
    split = functools.partial(split_batch, parts, run.update, trajectories)
    host_batch, layout = split(0)
    batch = learner.put(host_batch)
    # Scored before any optimizer step: the old log-probs are those of the weights before the update.
    own, measured = scorer.score(run.state.params, run.reference, batch, layout, run.update)
    check_gap(config, run.update, measured, own)
    scores = scorer.choose(batch, own)
    credit = learner.credit(batch, scores)
    first, steps = Pass(host_batch, layout, batch, scores, credit), []
    for state, metrics in optimize(learner, run.state, first, split, config.train.epochs):
        run.state = state
        steps.append(metrics)
        if config.train.max_lag:
            # On a shared device the engine would wait behind all steps that are queued.
            jax.block_until_ready(metrics)
    # One transfer after all steps: reading each step's metrics would stall the device in between.
    steps = jax.device_get(steps)
    measured |= scorer.measure_drift(run.state.params, run.reference, first, own, run.update)
    return first, steps, measured


def split_batch(
    parts: Parts, update: int, trajectories: Sequence[Trajectory], epoch: int
) -> tuple[Batch, Layout]:
    """Build the global batch; each update and epoch splits it into optimizer steps in another way."""
    config = parts.config
    alike = join_alike(trajectories, config.algorithm.anchor_similarity)
    return make_batch(alike, parts.shape, seed=(config.seed, update, epoch))


def finish_update(
    parts: Parts,
    run: RunState,
    delivery: Delivery,
    values: dict[str, float],
    incidents: IncidentMeter,
) -> None:
    """Count an update's episodes and mark the boundary after it; then conclude the update."""
    run.record.count(delivery.trajectories, delivery.outcomes)
    if parts.hosts.is_first:
        write_consumed(parts.run_dir, run.update, delivery.trajectories)
    if is_logged(parts.config, run.update):
        values |= incidents.take(delivery.outcomes, delivery.incidents)
    incidents.look(delivery.incidents)
    run.record.incidents = incidents.state
    # Marked before the evaluation: a stop or an error in it costs neither the update nor its line of metrics.
    run.record.unlogged = {name: float(value) for name, value in values.items()}
    mark_boundary(parts, run)
    conclude_update(parts, run, values)


def begin_meter(parts: Parts, run: RunState) -> IncidentMeter:
    """Make the meter of what happens between two lines; a resumed run counts from its last line."""
    ledger, pool, hosts = parts.rollout.ledger, parts.rollout.collector.pool, parts.hosts
    outcomes = add_counts(hosts, "outcomes", ledger.outcomes)
    counts = add_counts(hosts, "incidents", count_incidents(ledger, pool))
    incidents = IncidentMeter(outcomes, counts, run.record.incidents)
    run.record.incidents = incidents.state
    return incidents


def is_logged(config: Config, update: int) -> bool:
    """Return whether an update gets a line: every ``log.every``, with an evaluation, and at the end."""
    is_evaluated = config.eval.every > 0 and update % config.eval.every == 0
    return is_evaluated or update % config.log.every == 0 or update == config.train.updates


def conclude_update(parts: Parts, run: RunState, values: dict[str, float]) -> None:
    """Evaluate, log and write a checkpoint, each where it is due."""
    config = parts.config
    is_last = run.update == config.train.updates
    is_best = False
    if config.eval.every and run.update % config.eval.every == 0 and not is_last:
        found = evaluate(parts, run, "during").metrics
        values |= found
        is_best = run.record.note_success(run.update, found.get("eval_success", 0.0))
    values |= {f"seconds_{name}": seconds for name, seconds in parts.clock.lap().items()}
    if is_logged(config, run.update):
        parts.log.write(run.update, values)
    parts.progress.advance(1, values)
    run.record.unlogged = None
    is_due_now = run.update % config.checkpoint.every == 0 or is_time_to_save(parts, run)
    if is_due_now or is_best or is_last:
        mark_boundary(parts, run)
        save(parts, run)


def make_scorer(parts: Parts) -> Scorer:
    """Build the scorer of a run's batches."""
    config = parts.config
    return Scorer(
        parts.learner,
        is_source=config.algorithm.entropy_source == "learner",
        drift_every=config.log.drift_every,
        is_on_policy=config.train.max_lag == 0 and config.rollout.stored is None,
    )
