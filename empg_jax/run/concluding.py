"""The end of a run: its held-out episodes, its summary, its curves and its page."""

from __future__ import annotations

import contextlib

from empg_jax.errors import RunError
from empg_jax.report.results import write_results
from empg_jax.rollout.evaluator import Evaluation
from empg_jax.run.parts import Parts, RunState
from empg_jax.run.rollouts import write_held_out
from empg_jax.run.view import draw_results


def conclude_run(parts: Parts, run: RunState, final: Evaluation) -> None:
    """Write what a run leaves when its updates and its last evaluation are made.

    Raises:
      RunError: ``summary.json`` cannot be written; a resumed run makes its end again.
    """
    write_held_out(parts, run.update, final.trajectories)
    write_results(parts.run_dir, run.record, parts.clock.seconds, parts.config)
    for line in draw_results(parts.run_dir, has_page=parts.config.log.transcripts > 0):
        parts.progress.message(line)
        with contextlib.suppress(RunError):  # a full disk takes no event either, and the results are written
            parts.events.tell("not_drawn", detail=line)
