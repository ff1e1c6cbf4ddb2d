"""Held-out evaluation of a run on disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from empg_jax.rollout.evaluator import EvaluationError
from empg_jax.run.assembly import make_engine, make_evaluator, make_pool
from empg_jax.run.process import use_compile_cache
from empg_jax.run.saved import open_saved


def evaluate_run(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run, or one checkpoint of it (``RUN/checkpoints/STEP``).

    Args:
      path: run folder, or a step's folder inside its ``checkpoints``.
      overrides: dotted overrides of the run's configuration, for example ``eval.tasks=512``.

    Returns:
      ``eval_*`` metrics, ``eval_tasks``, ``split``, ``step``; for a model from ``model.path`` also
      ``text_logprob``, the weights' log-probability of a fixed text in nats per token.

    Raises:
      CheckpointError: there is no run or no usable checkpoint at the path.
    """
    saved = open_saved(path, overrides, warn=_warn)
    config = saved.config
    use_compile_cache(config.compile_cache)
    engine = make_engine(config, saved.model, saved.language.tokenizer)
    if saved.base is not None:
        engine.base = engine.place(saved.base)
    with make_pool(config) as pool:
        evaluator = make_evaluator(config, engine, pool, saved.language, first_handle=0)
        if evaluator.num_tasks < config.eval.tasks:
            _warn(
                f"eval.tasks={config.eval.tasks}: {config.env.eval_split} has {evaluator.num_tasks} tasks; "
                "all of them are attempted"
            )
        result = evaluator.run(saved.params, saved.step)
    if not result.trajectories:
        raise EvaluationError(
            f"none of the {evaluator.num_tasks} tasks of {config.env.eval_split} could be attempted: the "
            "environment failed every time"
        )
    if evaluator.num_tasks < config.eval.tasks:
        found = f"the panel {config.env.eval_split} has {evaluator.num_tasks} tasks"
        _warn(f"eval.tasks={config.eval.tasks}, but {found}; all of them were attempted")
    fingerprint = {} if config.model.path is None else {"text_logprob": saved.text_logprob()}
    return (
        result.metrics
        | fingerprint
        | {
            "eval_tasks": evaluator.num_tasks,
            "split": config.env.eval_split,
            "step": saved.step,
        }
    )


def _warn(line: str) -> None:
    print(line, file=sys.stderr)
