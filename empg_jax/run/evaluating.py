"""Evaluation of a run's weights on the held-out tasks, before, during and after its updates."""

from __future__ import annotations

import functools

from empg_jax.learner.fingerprint import policy_checksum
from empg_jax.report.record import PanelResult
from empg_jax.rollout.evaluator import Evaluation
from empg_jax.run.parts import Parts, RunState
from empg_jax.run.saving import mark_boundary, save
from empg_jax.run.together import gather_evaluation


def evaluate_before(parts: Parts, run: RunState) -> Evaluation:
    """Evaluate the policy that RL starts from, and write the first checkpoint."""
    run.record.weights_before = policy_checksum(run.state.params)
    before = evaluate(parts, run, "before")
    if parts.config.eval.every:
        run.record.note_success(run.update, before.metrics.get("eval_success", 0.0))
    mark_boundary(parts, run)
    save(parts, run)
    parts.checkpoints.wait()  # from here on a run can always be resumed
    return before


def describe_success(result: Evaluation, num_tasks: int) -> str:
    """Describe an evaluation in a line: the success, and the tasks that could not be attempted."""
    attempted = num_tasks - len(result.missing)
    success = f"success {result.metrics['eval_success']:.1%}" if attempted else "no result"
    missing = f" ({len(result.missing)} of {num_tasks} failed outside the policy)" if result.missing else ""
    return f"{success} on {attempted} tasks{missing}"


def evaluate(parts: Parts, run: RunState, when: str) -> Evaluation:
    """Evaluate the current weights on the held-out panel; ``before`` and ``after`` go into the summary."""
    evaluator, progress = parts.evaluator, parts.progress
    with parts.clock.phase("eval"):
        if when != "during":  # else the display stays with the RL phase
            progress.phase(f"evaluation ({when})", len(evaluator.places), "tasks")
        advance = progress.advance if when != "during" else lambda n, values: None
        # All hosts gather the weights together, so none may fail between them: here, and not in the thread.
        placed = parts.engine.place(run.state.params)
        play = functools.partial(evaluator.run, placed, run.update, advance=advance, check=parts.check_stop)
        del placed
        # One thread at a time uses the environment workers, and that is the rollout thread while it runs.
        result = gather_evaluation(parts.hosts, lambda: parts.rollout.call(play), parts.should_stop)
    if when != "during":
        run.record.panels[when] = PanelResult(run.update, result.metrics, result.wins)
    progress.message(f"{when}: {describe_success(result, evaluator.num_tasks)}")
    return result
