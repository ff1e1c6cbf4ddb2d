"""The warm start as a phase of a run, with metrics, progress display and checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib

from empg_jax.errors import Interrupted
from empg_jax.learner.state import TrainState, restart_optimizer
from empg_jax.metrics import MetricsLog
from empg_jax.run.assembly import make_rl_optimizer
from empg_jax.run.parts import Parts, RunState, freeze_reference
from empg_jax.run.saving import is_time_to_save, mark_boundary, save
from empg_jax.run.storage import to_bytes
from empg_jax.sft.examples import Examples, gather_examples
from empg_jax.sft.warm_start import warm_start


def warm_start_phase(parts: Parts, run: RunState, examples: Examples | None = None) -> None:
    """Run the supervised warm start (if configured), and start the optimizer of RL.

    Args:
      parts: the run's parts.
      run: the run's state.
      examples: training examples of the warm start; None gathers them.
    """
    if parts.config.sft.updates:
        train_on_examples(parts, run, examples)
    optimizer, _ = make_rl_optimizer(parts.config)
    _free_moments(run)
    run.state = restart_optimizer(run.state.params, optimizer, parts.learner.shardings)
    run.record.phase = "rl"
    freeze_reference(parts, run)
    mark_boundary(parts, run)


def train_on_examples(parts: Parts, run: RunState, examples: Examples | None = None) -> None:
    """Run the remaining updates of the warm start.

    Args:
      parts: the run's parts.
      run: the run's state; it receives the trained parameters.
      examples: the examples; None gathers them (`gather_examples`).

    Raises:
      ChatDataError: ``sft.data`` was changed since the run began.
      Interrupted: the run was asked to stop.
    """
    config, progress = parts.config, parts.progress
    with parts.clock.phase("sft"):
        if examples is None:
            # On several hosts a stop waits for the next agreement.
            check = parts.check_stop if parts.hosts.num == 1 else lambda: None
            examples = gather_examples(config, parts.language, progress, check=check)
        examples.note(run.record)
        if parts.hosts.num > 1:
            shown = [examples.train[index] for index in examples.draw(0)]
            digest = hashlib.sha256(to_bytes(shown)).hexdigest()
            parts.hosts.require_same("examples", digest, "the data of the warm start (sft.*)")
        progress.phase("warm start", config.sft.updates, "updates")
        first = run.record.sft_update
        progress.advance(first, {})
        name = "sft_metrics.jsonl"
        with MetricsLog(
            parts.run_dir,
            filename=name,
            resume_at=first,
            warn=progress.message,
            is_written=parts.hosts.is_first,
        ) as log:

            def on_update(number: int, state: TrainState, values: dict[str, float]) -> None:
                log.write(number, values)
                _after_update(parts, run, number, state, values)

            if first == 0:
                _free_moments(run)
            run.state = warm_start(
                config,
                parts.learner.model,
                parts.learner.mesh,
                run.state,
                examples,
                base=parts.learner.base,
                first=first,
                on_update=on_update,
            )


def _free_moments(run: RunState) -> None:
    """Give up the optimizer's state before the next one is made: there is not room for both."""
    run.marked = None  # no checkpoint can be written of what is left
    run.state = dataclasses.replace(run.state, opt_state=())


def _after_update(
    parts: Parts, run: RunState, number: int, state: TrainState, values: dict[str, float]
) -> None:
    config, record = parts.config, run.record
    parts.progress.advance(1, values)
    if "sft_eval_loss" in values:
        record.sft_eval_loss = values["sft_eval_loss"]
        parts.progress.message(
            f"warm start update {number + 1}: loss {values['sft_loss']:.4f}, "
            f"held-out {values['sft_eval_loss']:.4f}"
        )
    # A warm start on demonstrations is short enough to repeat; one on large files is saved regularly.
    is_saved = config.sft.data is not None and (number + 1) % config.checkpoint.every == 0
    is_saved = is_saved or is_time_to_save(parts, run)
    run.state, record.sft_update = state, number + 1
    mark_boundary(parts, run)
    if parts.hosts.any("stop", parts.should_stop()):
        raise Interrupted
    if is_saved and number + 1 < config.sft.updates:
        save(parts, run)
