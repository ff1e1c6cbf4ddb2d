"""Held-out evaluation: every task of a panel once, in the training environment's own path."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from empg_jax.assembly import Language, make_collector, make_engine, make_pool
from empg_jax.config_text import ConfigError
from empg_jax.rollout.engine import Engine
from empg_jax.rollout.episode import Attempt, tell_discarded
from empg_jax.rollout.pool import EnvPool
from empg_jax.types import Params, Trajectory

if TYPE_CHECKING:
    from empg_jax.config import Config

STREAM = 1  # sampling keys of evaluation never meet those of training
MAX_RETRIES = 3


class EvaluationError(RuntimeError):
    """An evaluation could not be made."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results on a panel: one number per metric name, and the episodes."""

    metrics: dict[str, float]
    trajectories: list[Trajectory]

    @property
    def wins(self) -> str:
        """``1`` for every task solved and ``0`` for every other, in the panel's order."""
        return "".join(str(int(trajectory.is_success)) for trajectory in self.trajectories)


class Evaluator:
    """Evaluates weights on a fixed list of held-out tasks, on an engine of its own.

    Args:
      config: the run's configuration (``eval.*``, ``env.eval_split``).
      pool: environment workers, shared with training.
      language: tokenizer, context and parser.
      engine: a sampler at ``eval.temperature`` whose slots are free.
      first_handle: first pool handle that training does not use.
    """

    def __init__(
        self, config: Config, pool: EnvPool, language: Language, engine: Engine, *, first_handle: int
    ) -> None:
        self.engine, self._split, self._tell = engine, config.env.eval_split, pool.tell
        if self._split not in pool.splits:
            raise ConfigError(
                f"env.eval_split={self._split} does not exist; the environment has {', '.join(pool.splits)}"
            )
        self.num_tasks = min(config.eval.tasks, pool.splits[self._split])
        self._collector = make_collector(
            config, engine, pool, language, stream=STREAM, first_handle=first_handle
        )

    def run(
        self,
        params: Params,
        version: int,
        *,
        advance: Callable[[int, dict[str, float]], None] = lambda n, values: None,
    ) -> Evaluation:
        """Attempt every task once with these weights.

        Args:
          params: stacked parameters.
          version: their policy version.
          advance: told of finished episodes, for a progress display.

        Raises:
          EvaluationError: a task failed for a cause outside the policy, again and again.
        """
        self.engine.load(params, version)
        self._collector.admit(Attempt(self._split, task, task, 0) for task in range(self.num_tasks))
        found: dict[int, Trajectory] = {}
        while len(found) < self.num_tasks:
            for attempt, trajectory in self._collector.advance():
                if trajectory.outcome.is_trained:
                    found[attempt.task] = trajectory
                    advance(1, {})
                    continue
                tell_discarded(self._tell, attempt, trajectory.outcome)
                if attempt.retry + 1 < MAX_RETRIES:
                    self._collector.admit([dataclasses.replace(attempt, retry=attempt.retry + 1)])
                else:
                    self._collector.cancel_all()
                    raise EvaluationError(
                        f"task {self._split}/{attempt.task} failed {MAX_RETRIES} times: "
                        f"{trajectory.outcome.reason}: {trajectory.outcome.detail}"
                    )
        trajectories = [found[task] for task in range(self.num_tasks)]
        return Evaluation(summarise(trajectories), trajectories)


def summarise(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean success, return, turns, entropy, validity and the environment's own numbers, as ``eval_*``."""
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    entropies = np.concatenate([turn.entropies for turn in turns])
    values = {
        "eval_success": float(np.mean([t.is_success for t in trajectories])),
        "eval_return": float(np.mean([t.episode_return for t in trajectories])),
        "eval_turns": float(np.mean([len(t.turns) for t in trajectories])),
        "eval_entropy": float(entropies.mean()),
        "eval_invalid_actions": float(np.mean([not turn.is_valid for turn in turns])),
    }
    for name in sorted({name for t in trajectories for name in t.metrics}):
        values[f"eval_env_{name}"] = float(
            np.mean([t.metrics[name] for t in trajectories if name in t.metrics])
        )
    return values


def evaluate_run(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run, or one checkpoint of it (``RUN/checkpoints/STEP``).

    Args:
      path: run folder, or a step's folder inside its ``checkpoints``.
      overrides: dotted overrides, for example ``eval.tasks=512``.

    Returns:
      ``eval_*`` metrics, ``eval_tasks``, ``split``, ``step``; for a model that came from ``model.path`` also
      ``text_logprob``, the weights' nats per token on a fixed text.

    Raises:
      CheckpointError: there is no run or no usable checkpoint at the path.
    """
    from empg_jax.saved import open_saved

    saved = open_saved(path, overrides, warn=_warn)
    config = saved.config
    engine = make_engine(config, saved.model, saved.language.tokenizer, temperature=config.eval.temperature)
    if saved.base is not None:
        engine.base = engine.place(saved.base)
    with make_pool(config) as pool:
        evaluator = Evaluator(config, pool, saved.language, engine, first_handle=0)
        result = evaluator.run(saved.params, saved.step)
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
