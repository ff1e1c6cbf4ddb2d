"""Evaluation on held-out tasks: every task of a panel once, in the training environment's own path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from empg_jax.engine.engine import Engine
from empg_jax.errors import RunError
from empg_jax.rollout.collector import Collector
from empg_jax.rollout.episode import Attempt, tell_discarded
from empg_jax.rollout.source import MAX_RETRIES
from empg_jax.types import Params, Trajectory
from empg_jax.workers.faults import Tell, tell_nobody


class EvaluationError(RunError):
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
      collector: plays episodes on an engine whose slots are free, with keys that training does not use.
      engine: that engine, at ``eval.temperature``.
      split: panel of tasks.
      num_tasks: its first so many tasks are attempted.
      tell: takes an event for every attempt that was discarded.
    """

    def __init__(
        self, collector: Collector, engine: Engine, *, split: str, num_tasks: int, tell: Tell = tell_nobody
    ) -> None:
        self.engine, self.num_tasks = engine, num_tasks
        self._collector, self._split, self._tell = collector, split, tell

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
        return Evaluation(summarize(trajectories), trajectories)


def summarize(trajectories: Sequence[Trajectory]) -> dict[str, float]:
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
