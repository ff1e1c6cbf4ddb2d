"""Held-out evaluation of a policy: a run on disk, one of its checkpoints, or a model with a configuration."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_jax.report.evaluation import estimate_success
from empg_jax.report.progress import Progress
from empg_jax.rollout.evaluator import EvaluationError
from empg_jax.run.environment import eval_panels
from empg_jax.run.process import prepare_jax
from empg_jax.run.sampling import (
    make_engine,
    make_evaluator,
    make_pool,
)
from empg_jax.run.saved import SavedRun, open_new, open_saved

if TYPE_CHECKING:
    from empg_jax.config import Config


def evaluate_run(path: Path, overrides: list[str], *, attempts: int = 1) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run, or one checkpoint of it (``RUN/checkpoints/STEP``).

    Args:
      path: run folder, or a step's folder inside its ``checkpoints``.
      overrides: dotted overrides of the run's configuration, for example ``eval.tasks=512``.
      attempts: attempts at each task, each with sampling keys of its own.

    Returns:
      ``eval_*`` metrics, ``eval_tasks``, ``split``, ``step``, ``source``, ``env``; what
      `empg_jax.report.evaluation.estimate_success` tells; for a model from ``model.path`` also
      ``text_logprob``, the weights' log-probability of a fixed text in nats per token.

    Raises:
      CheckpointError: there is no run or no usable checkpoint at the path.
      EvaluationError: the environment failed in every attempt.
    """
    return {**_evaluate(open_saved(path, overrides, warn=_warn), attempts), "source": str(path)}


def evaluate_model(source: str, config: Config, *, attempts: int = 1) -> dict[str, Any]:
    """Evaluate the weights that a configuration starts from; otherwise as `evaluate_run`.

    Args:
      source: the model's name for the report.
      config: a configuration with ``model.path`` or ``model.preset``.
      attempts: attempts at each task.
    """
    return {**_evaluate(open_new(_with_fewer_slots(config, attempts)), attempts), "source": source}


def _with_fewer_slots(config: Config, attempts: int) -> Config:
    """Take no more slots than there are episodes: each has room for a whole conversation."""
    r = config.rollout
    slots = r.slots or r.tasks_per_update * r.group_size
    episodes = config.eval.tasks * len(eval_panels(config)) * attempts
    needed = -(-episodes // r.data) * r.data  # the slots are split over these devices
    return config.model_copy(update={"rollout": r.model_copy(update={"slots": min(slots, needed)})})


def _evaluate(saved: SavedRun, attempts: int) -> dict[str, Any]:
    config, split = saved.config, saved.config.env.eval_split
    prepare_jax(config)
    engine = make_engine(config, saved.model, saved.language.tokenizer)
    if saved.base is not None:
        engine.base = engine.place(saved.base)
    if attempts > 1 and config.eval.temperature == 0:
        _warn("eval.temperature=0: the attempts at a task differ only where its environment does")
    with make_pool(config) as pool:
        evaluator = make_evaluator(config, engine, pool, saved.language, first_handle=0, attempts=attempts)
        for panel, count in evaluator.panels.items():
            if count < config.eval.tasks:
                _warn(f"eval.tasks={config.eval.tasks}: {panel} has {count} tasks; all of them are attempted")
        with Progress(config.log.progress) as progress:
            progress.phase("evaluation", evaluator.num_tasks * attempts, "episodes")
            result = evaluator.run(saved.params, saved.step, advance=progress.advance)
    if not result.trajectories:
        raise EvaluationError(
            f"none of the {evaluator.num_tasks} tasks of {split} could be attempted: the "
            "environment failed every time"
        )
    fingerprint = {} if config.model.path is None else {"text_logprob": saved.text_logprob()}
    return {
        **result.metrics,
        **fingerprint,
        "eval_tasks": evaluator.num_tasks,
        "split": split,
        "step": saved.step,
        "env": config.env.target,
        **estimate_success(result.trajectories, attempts),
    }


def _warn(line: str) -> None:
    print(line, file=sys.stderr)
