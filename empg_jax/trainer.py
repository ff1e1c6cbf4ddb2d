"""Training: warm start, then the loop of rollout, credit and update. `rl_loop` is the page to read first."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from empg_jax import sft
from empg_jax.assembly import make_language, make_pool
from empg_jax.checkpoint import Checkpoints
from empg_jax.evaluate import Evaluation
from empg_jax.learner.passes import Pass, Scorer, optimize
from empg_jax.learner.state import TrainState, restart_optimizer
from empg_jax.metrics import MetricsLog
from empg_jax.replay.batching import Layout, make_batch
from empg_jax.report.events import EventLog
from empg_jax.report.progress import Progress
from empg_jax.report.results import count_episodes, describe_update, dump_batch, write_results
from empg_jax.report.rollouts import drop_rollouts, is_due, write_update
from empg_jax.report.runinfo import create_run_dir, write_run_info
from empg_jax.rollout.incidents import IncidentMeter
from empg_jax.rollout.source import Interrupted
from empg_jax.run import (
    Run,
    freeze_reference,
    has_begun,
    make_rl_optimizer,
    mark_boundary,
    open_run,
    restore_state,
    save,
)
from empg_jax.runtime import CompileCounter, StopRequest
from empg_jax.types import Batch, Trajectory
from empg_jax.weights import check_model

if TYPE_CHECKING:
    from empg_jax.config import Config

# Sampler and learner run the same model: a larger mean gap of their log-probs means that one is wrong.
GAP_LIMIT = 0.05
MAX_ROLLBACKS = 3


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what was kept."""


class Stopped(Exception):
    """The run was asked to stop and has written its checkpoint.

    Attributes:
      signum: the signal that asked.
      run_dir: the run to resume.
    """

    def __init__(self, signum: int, run_dir: Path) -> None:
        super().__init__(f"stopped by signal {signum}; go on with: empg-jax train --resume {run_dir}")
        self.signum, self.run_dir = signum, run_dir


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
        # Bad models and data are told before a folder is made and a model is built.
        check_model(config)
        examples = None
        if config.sft.data is not None and resume is None:
            examples = sft.gather_examples(config, make_language(config), progress)
        run_dir = resume if resume is not None else create_run_dir(config)
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
        run = open_run(config, run_dir, checkpoints, pool, progress, compiles, stop, is_resumed, events)
        stack.callback(run.log.close)
        drop_rollouts(run_dir, after=run.update)
        try:
            final = None
            if run.record.get("phase", "sft") == "sft":
                final = warm_start_phase(run, examples)
            rl_loop(run)
            if final is None or config.train.updates:  # a warm start alone was evaluated at its end
                final = evaluate(run, "after")
        except Interrupted:
            events.tell("stop_requested", signal=stop.signum)
            save(run)
            checkpoints.wait()
            raise Stopped(stop.signum, run_dir) from None
        run.record["recompiles_after_warmup"] = compiles.count - run.compiled
    write_results(
        run_dir, run.record, run.clock.seconds, final.trajectories, run.language.tokenizer.decode, config
    )
    return run_dir


def tell_passed_over(progress: Progress, events: EventLog, line: str) -> None:
    """Tell the person and the diary of a checkpoint that could not be read."""
    progress.message(line)
    events.tell("checkpoint_skipped", detail=line)


def rl_loop(run: Run) -> None:
    """Rollout, score, credit, update, publish; until ``train.updates``."""
    config, learner = run.config, run.learner
    scorer = make_scorer(run)
    run.progress.phase("RL", config.train.updates, "updates", done=run.update)
    run.compiled = run.compiles.count
    incidents = IncidentMeter(run.source)
    while run.update < config.train.updates:
        began, compiled = time.monotonic(), run.compiles.count
        run.clock.lap()
        run.events.update = run.update + 1
        mark_boundary(run)
        with run.clock.phase("rollout"):
            run.engine.load(run.state.params, run.update)
            trajectories = run.source.collect(run.update, run.should_stop)
        with run.clock.phase("update"):
            split = functools.partial(split_batch, run, trajectories)
            host_batch, layout = split(0)
            batch = learner.put(host_batch)
            own, measured = scorer.score(run.state.params, run.reference, batch, layout, run.update)
            check_gap(run, measured)
            scores = scorer.choose(batch, own)
            credit = learner.credit(batch, scores)
            first, steps = Pass(host_batch, layout, batch, scores, credit), []
            for state, metrics in optimize(learner, run.state, first, split, config.train.epochs):
                run.state = state
                steps.append(metrics)
            credit_metrics, steps = jax.device_get((credit.metrics, steps))
            measured |= scorer.measure_drift(run.state.params, run.reference, first, own, run.update)
        run.update += 1
        check_steps(run, steps, host_batch)
        run.source.collector.settle()
        if is_due(run.update, every=config.log.rollouts_every, last=config.train.updates):
            tokens = config.log.rollouts_tokens
            write_update(run.run_dir, run.update, trajectories, first, with_tokens=tokens)
        values = describe_update(
            trajectories,
            layout,
            run.shape,
            version=run.update - 1,
            engine=run.engine.take_stats(),
            credit=credit_metrics,
            steps=steps,
            seconds=time.monotonic() - began,
        )
        values |= measured | run.source.metrics | {"recompiles": run.compiles.count - compiled}
        values |= {"learning_rate": float(run.schedule(run.state.step))}
        finish_update(run, trajectories, values, incidents)


def split_batch(run: Run, trajectories: Sequence[Trajectory], epoch: int) -> tuple[Batch, Layout]:
    """Build the global batch; every update and epoch deals its trajectories to other optimizer steps."""
    seed = (run.config.seed, run.update, epoch)
    return make_batch(trajectories, run.shape, seed=seed, gamma=run.config.algorithm.turn_gamma)


def finish_update(
    run: Run, trajectories: Sequence[Trajectory], values: dict[str, float], incidents: IncidentMeter
) -> None:
    """Count, evaluate, log and save what is due after an update."""
    config = run.config
    count_episodes(run.record, trajectories, run.source.outcomes)
    if config.eval.every and run.update % config.eval.every == 0 and run.update < config.train.updates:
        values |= evaluate(run, "during").metrics
    values |= {f"seconds_{name}": seconds for name, seconds in run.clock.lap().items()}
    if run.update % config.log.every == 0:
        run.log.write(run.update, values | incidents.take())
    run.progress.advance(1, values)
    if run.update % config.checkpoint.every == 0 or run.update == config.train.updates:
        mark_boundary(run)
        save(run)


def make_scorer(run: Run) -> Scorer:
    """The scorer of a run's batches."""
    config = run.config
    return Scorer(
        run.learner,
        is_source=config.algorithm.entropy_source == "learner",
        drift_every=config.log.drift_every,
        is_on_policy=config.train.max_lag == 0,
    )


def check_gap(run: Run, measured: Mapping[str, float]) -> None:
    """Stop where sampler and learner disagree about data of the learner's own version.

    Raises:
      TrainingError: the gap is beyond the gate.
    """
    mean = measured.get("logprob_gap", 0.0)
    if mean > GAP_LIMIT:
        raise TrainingError(
            f"sampler and learner disagree: the mean log-prob difference is {mean:.3g} at update "
            f"{run.update}, limit {GAP_LIMIT:g}. They run the same weights, so this is a numerical fault "
            f"(model.dtype={run.config.model.dtype})"
        )


def check_steps(run: Run, steps: list[dict[str, Any]], batch: Batch) -> None:
    """Act on optimizer steps that were left out: loss or gradient not finite, or too far from the old policy.

    Raises:
      TrainingError: the configuration says stop, or rolling back did not help.
    """
    train = run.config.train
    guards = (
        ("nonfinite", train.on_nonfinite, "loss or gradient was not finite"),
        ("kl_exceeded", train.on_kl, f"the KL from the old policy was beyond train.max_kl={train.max_kl}"),
    )
    counts = {name: int(sum(float(step[name]) for step in steps)) for name, _, _ in guards}
    if not any(counts.values()):
        run.record["rollbacks_in_a_row"] = 0
        return
    path = dump_batch(run.run_dir, run.update, batch)
    for name, policy, why in guards:
        if not counts[name]:
            continue
        what = f"update {run.update}: {why} in {counts[name]} of {len(steps)} optimizer steps; batch: {path}"
        run.events.tell("steps_left_out", reason=name, steps=counts[name], policy=policy)
        if policy == "rollback":
            run.record["rollbacks_in_a_row"] = run.record.get("rollbacks_in_a_row", 0) + 1
        if policy == "stop" or run.record.get("rollbacks_in_a_row", 0) > MAX_ROLLBACKS:
            run.checkpoints.wait()
            raise TrainingError(f"{what}; those steps changed nothing; checkpoints: {run.checkpoints.steps}")
        run.progress.message(f"{what}; {policy}")
        if policy == "rollback":
            run.events.tell("rollback", reason=name, checkpoints=run.checkpoints.steps)
            run.checkpoints.wait()
            run.state = restore_state(run.config, run.checkpoints, run.learner).state


# --------------------------------------------------------------------------------------- other phases


def warm_start_phase(run: Run, examples: sft.Examples | None = None) -> Evaluation:
    """Supervised warm start (if configured), the evaluation before RL, and the first checkpoint.

    Args:
      run: the run.
      examples: what to learn from; None gathers it.

    Returns:
      The evaluation before RL.
    """
    config = run.config
    if config.sft.updates:
        with run.clock.phase("sft"):
            if examples is None:
                examples = sft.gather_examples(config, run.language, run.progress)
            examples.note(run.record)
            first = run.record.get("sft_update", 0)
            run.progress.phase("warm start", config.sft.updates, "updates", done=first)
            with MetricsLog(run.run_dir, filename="sft_metrics.jsonl", resume_at=first) as log:
                run.state = sft.warm_start(
                    config,
                    run.learner.model,
                    run.learner.mesh,
                    run.state,
                    examples,
                    base=run.learner.base,
                    first=first,
                    on_update=lambda number, state, values: _after_sft_update(
                        run, log, number, state, values
                    ),
                )
    optimizer, _ = make_rl_optimizer(config)
    run.state = restart_optimizer(run.state.params, optimizer, run.learner.shardings)
    run.record["phase"] = "rl"
    freeze_reference(run)
    before = evaluate(run, "before")
    mark_boundary(run)
    save(run)
    run.checkpoints.wait()  # from here on there is always something to go on from
    return before


def _after_sft_update(
    run: Run, log: MetricsLog, number: int, state: TrainState, values: dict[str, float]
) -> None:
    log.write(number, values)
    run.progress.advance(1, values)
    config = run.config
    if "sft_eval_loss" in values:
        run.record["sft_eval_loss"] = values["sft_eval_loss"]
        run.progress.message(
            f"warm start update {number + 1}: loss {values['sft_loss']:.4f}, "
            f"held-out {values['sft_eval_loss']:.4f}"
        )
    # Demonstrations are soon learned anew; a large file is not.
    is_saved = config.sft.data is not None and (number + 1) % config.checkpoint.every == 0
    should_stop = run.should_stop()
    if is_saved or should_stop:
        run.state = state
        run.record |= {"phase": "sft", "sft_update": number + 1}
        mark_boundary(run)
    if should_stop:
        raise Interrupted
    if is_saved and number + 1 < config.sft.updates:
        save(run)


def evaluate(run: Run, when: str) -> Evaluation:
    """Evaluate the current weights on the held-out panel; ``before`` and ``after`` go into the summary."""
    with run.clock.phase("eval"):
        if when == "during":  # the display stays with the RL phase
            result = run.evaluator.run(run.state.params, run.update)
        else:
            run.progress.phase(f"evaluation ({when})", run.evaluator.num_tasks, "tasks")
            result = run.evaluator.run(run.state.params, run.update, advance=run.progress.advance)
    if when != "during":
        run.record |= {f"{name}_{when}": value for name, value in result.metrics.items()}
        run.record |= {"eval_tasks": run.evaluator.num_tasks, "updates": run.update}
        run.record[f"eval_wins_{when}"] = result.wins
    run.progress.message(
        f"{when}: success {result.metrics['eval_success']:.1%} on {run.evaluator.num_tasks} tasks"
    )
    return result
