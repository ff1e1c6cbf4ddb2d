"""Guards of training: faults that steps left out, a sampler that disagrees, and when they end a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from empg_jax.algorithms.keys import KEEPS, OFF
from empg_jax.errors import RunError
from empg_jax.learner.passes import Pass
from empg_jax.parallel.arrays import fetch
from empg_jax.parallel.order import launching
from empg_jax.report.debug import dump_update, measure_leaves
from empg_jax.run.parts import Parts, RunState
from empg_jax.run.restoring import restore_state
from empg_jax.run.saving import good_step
from empg_jax.types import Scores

if TYPE_CHECKING:
    from empg_jax.config import Config

# Sampler and learner run the same weights: a larger mean gap of their log-probs is a fault in one of them.
GAP_LIMIT = 0.05
MAX_ROLLBACKS = 3  # in consecutive updates, before training stops
MAX_SKIPS = 3  # consecutive updates without any optimizer step, before training stops (or tells of it)


class TrainingError(RunError):
    """Training cannot continue; the message names the cause and the checkpoints that are left."""


def check_gap(config: Config, update: int, measured: Mapping[str, float], own: Scores | None) -> None:
    """Stop training when sampler and learner disagree on samples of the current weights.

    Weights whose log-probs are no numbers are no disagreement: `check_steps` deals with them.

    Args:
      config: the run's configuration.
      update: number of updates made so far.
      measured: the gap, where it was measured.
      own: the learner's scores that it was measured with.

    Raises:
      TrainingError: the gap is above `GAP_LIMIT`, or no number although the learner's log-probs are.
    """
    mean = measured.get("logprob_gap", 0.0)
    if own is not None and math.isnan(mean) and np.isnan(fetch(own.old_logprobs)).any():
        return
    if not mean <= GAP_LIMIT:
        cause = f"a numerical fault (model.dtype={config.model.dtype})"
        if config.rollout.engine != "builtin":
            cause += f", or the server of rollout.url={config.rollout.url} has other weights or another model"
        raise TrainingError(
            f"sampler and learner disagree: the mean log-prob difference is {mean:.3g} at update "
            f"{update}, limit {GAP_LIMIT:g}. They run the same weights, so this is {cause}"
        )


def check_steps(parts: Parts, run: RunState, steps: list[dict[str, Any]], first: Pass) -> None:
    """Handle skipped optimizer steps: loss or gradient was not finite, or the KL was above ``train.max_kl``.

    An update without any token to train on is no fault, and no sign of good weights: the counts stay as they
    are. `MAX_SKIPS` of them in a row are told of, once.

    Raises:
      TrainingError: the configured policy is ``stop``, `MAX_ROLLBACKS` rollbacks did not help, or `MAX_SKIPS`
        updates in a row made no step at all.
    """
    train, record = parts.config.train, run.record
    guards = (
        ("nonfinite", train.on_nonfinite, "loss or gradient was not finite"),
        ("kl_exceeded", train.on_kl, f"the KL from the old policy was beyond train.max_kl={train.max_kl}"),
    )
    counts = {name: int(sum(float(step[name]) for step in steps)) for name, _, _ in guards}
    empty = int(sum(float(step["empty"]) for step in steps))
    record.empty_in_a_row = record.empty_in_a_row + 1 if empty == len(steps) else 0
    if record.empty_in_a_row:
        if record.empty_in_a_row == MAX_SKIPS:
            _tell_of_empty_updates(parts, run)
        return
    if not any(counts.values()):
        record.rollbacks_in_a_row = record.skips_in_a_row = 0
        if run.saved is not None:  # the update that followed it had no fault
            record.last_good = run.saved["update"]
        return
    record.skips_in_a_row = record.skips_in_a_row + 1 if sum(counts.values()) + empty == len(steps) else 0
    path = _dump(parts, run, steps, first)
    for name, policy, why in guards:
        if not counts[name]:
            continue
        what = f"update {run.update}: {why} in {counts[name]} of {len(steps)} optimizer steps; batch: {path}"
        parts.events.tell("steps_left_out", reason=name, steps=counts[name], policy=policy)
        if policy == "rollback":
            record.rollbacks_in_a_row += 1
        if policy == "stop":
            raise _error(parts, run, f"{what}; those steps changed nothing")
        if record.rollbacks_in_a_row > MAX_ROLLBACKS:
            raise _error(parts, run, f"{what}; {MAX_ROLLBACKS} rollbacks in a row did not help")
        if policy == "skip" and record.skips_in_a_row > MAX_SKIPS:
            raise _error(
                parts, run, f"{what}; {record.skips_in_a_row} updates in a row made no optimizer step at all"
            )
        parts.progress.message(f"{what}; {policy}")
        if policy == "rollback":
            _roll_back(parts, run, name)


def _tell_of_empty_updates(parts: Parts, run: RunState) -> None:
    """Tell that updates in a row trained on nothing, and of the keys that left their tokens out."""
    algorithm = parts.config.algorithm
    chosen = {key: getattr(algorithm, key) for key in KEEPS}
    chosen |= {"correction.kind": algorithm.correction.kind if algorithm.correction.kind == "mis" else OFF}
    chosen |= {"entry_point": algorithm.entry_point or OFF}
    keys = [f"algorithm.{key}={value}" for key, value in chosen.items() if value != OFF]
    parts.events.tell("updates_empty", updates=MAX_SKIPS, keys=keys)
    parts.progress.message(
        f"update {run.update}: {MAX_SKIPS} updates in a row had no token to train on, so the weights stand "
        f"still; tokens are left out by {', '.join(keys) or 'the loss'}"
    )


def _dump(parts: Parts, run: RunState, steps: list[dict[str, Any]], first: Pass) -> str:
    """Write what the update was made of; return where. A full disk costs it, not the run."""
    # Collectives over several hosts, so all take part.
    with launching(parts.learner.mesh):
        measured = measure_leaves(run.state.params)
    scores, credit, leaves = fetch((first.scores, first.credit, measured))
    if not parts.hosts.is_first:
        return "on host 0"
    dumped = {"scores": scores, "credit": credit, "leaves": leaves, "steps": steps}
    try:
        path = dump_update(parts.run_dir, run.update, first.host, **dumped)
    except OSError as error:
        parts.events.tell("batch_not_written", detail=str(error))
        return f"not written ({error})"
    return f"{path} (empg-jax inspect)"


def _roll_back(parts: Parts, run: RunState, reason: str) -> None:
    parts.checkpoints.wait()
    steps = parts.checkpoints.steps
    parts.events.tell("rollback", reason=reason, checkpoints=steps)
    # When the newest did not help, it may be at fault itself.
    step = good_step(run, steps) if run.record.rollbacks_in_a_row > 1 else None
    run.state = restore_state(parts.config, parts.checkpoints, parts.learner, step).state


def _error(parts: Parts, run: RunState, what: str) -> TrainingError:
    """Make the error that ends training, with the checkpoints that are left and the good one among them."""
    parts.checkpoints.wait()
    steps = parts.checkpoints.steps
    left = f"checkpoints: {steps}"
    good = good_step(run, steps)
    if good is not None:
        left += f"; the last good one: empg-jax train --resume {parts.run_dir} --step {good}"
    return TrainingError(f"{what}; {left}")
