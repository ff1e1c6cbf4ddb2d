"""Evaluation on held-out tasks: attempts at a panel's tasks, along the same path as training episodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from empg_jax.engine.interface import SamplingEngine
from empg_jax.errors import RunError
from empg_jax.metrics import group_success
from empg_jax.models.filtering import TokenFilter
from empg_jax.rollout.collector import Collector
from empg_jax.rollout.episode import Attempt, tell_discarded
from empg_jax.rollout.ledger import HOPELESS, MAX_RETRIES
from empg_jax.types import Trajectory
from empg_jax.workers.faults import Tell, tell_nobody


class EvaluationError(RunError):
    """No task of the panel could be attempted."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results on a panel: one number per metric name, and the episodes.

    Attributes:
      metrics: the numbers; ``eval_missing`` counts the attempts without a result.
      trajectories: the episodes of all other attempts, in the order of the panels and their tasks.
      missing: the place of every attempt that failed again and again outside the policy; tasks have places
        from 0, through all panels.
    """

    metrics: dict[str, float]
    trajectories: list[Trajectory]
    missing: tuple[int, ...] = ()

    @property
    def wins(self) -> str:
        """``1`` for a task solved, ``0`` for one not solved, ``-`` for one missing, by place.

        Only for evaluations of one attempt at each task.
        """
        episodes = iter(self.trajectories)
        count = len(self.trajectories) + len(self.missing)
        return "".join(
            "-" if place in self.missing else str(int(next(episodes).is_success)) for place in range(count)
        )


class Evaluator:
    """An evaluation of weights on a fixed list of held-out tasks, on an engine that lends its slots.

    Args:
      collector: plays episodes on the engine, with sampling keys that training does not use.
      engine: the engine, which training may use, too.
      temperature: of the held-out episodes.
      token_filter: of the held-out episodes.
      panels: number of tasks to attempt, from the start of each panel, by panel.
      attempts: attempts at each task, with sampling keys of their own.
      tell: receives an event for every attempt that was discarded.
      share: (index, number) of this host, which plays every ``number``-th task.

    Attributes:
      panels: the panels.
      num_tasks: tasks of all panels.
      places: the places of the tasks that this host plays; tasks have places from 0, through all panels.
      last_failure: why the last missing attempt has no result; empty where none is missing.
    """

    def __init__(
        self,
        collector: Collector,
        engine: SamplingEngine,
        *,
        temperature: float,
        token_filter: TokenFilter,
        panels: Mapping[str, int],
        attempts: int = 1,
        tell: Tell = tell_nobody,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.engine, self.panels = engine, panels
        self._tasks = [(split, task) for split, count in panels.items() for task in range(count)]
        self.num_tasks = len(self._tasks)
        self.places = range(share[0], self.num_tasks, share[1])
        self._collector, self._tell = collector, tell
        self.last_failure = ""
        self._temperature, self._filter, self._attempts = temperature, token_filter, attempts

    def run(
        self,
        placed: Any,
        version: int,
        *,
        advance: Callable[[int, dict[str, float]], None] = lambda n, values: None,
        check: Callable[[], None] = lambda: None,
        done: Sequence[Trajectory] = (),
        keep: Callable[[Trajectory], None] = lambda trajectory: None,
    ) -> Evaluation:
        """Attempt every task of this host with these weights.

        An attempt that fails `MAX_RETRIES` times for a cause outside the policy is missing: it has no part in
        any mean, and an event tells of it.

        Args:
          placed: the weights, as the engine's `place` makes them of stacked parameters.
          version: the policy version of these weights.
          advance: called for every finished episode, for a progress display.
          check: called in every round; it may raise to end the evaluation.
          done: episodes of an evaluation like this one that was cut off; their attempts are not made again.
          keep: called with every finished episode that counts.
        """
        with self.engine.lent(placed, version, temperature=self._temperature, token_filter=self._filter):
            return self._play(list(done), advance, check, keep)

    def _play(
        self,
        found: list[Trajectory],
        advance: Callable[[int, dict[str, float]], None],
        check: Callable[[], None],
        keep: Callable[[Trajectory], None],
    ) -> Evaluation:
        made = {(episode.group_id, episode.member) for episode in found}
        if found:
            advance(len(found), {})
        # A place takes the part of a group's number: no two attempts of an evaluation share sampling keys.
        self._collector.admit(
            Attempt(*self._tasks[place], place, member)
            for place in self.places
            for member in range(self._attempts)
            if (place, member) not in made
        )
        missing: list[int] = []
        self._collector.check = check
        while len(found) + len(missing) < len(self.places) * self._attempts:
            try:
                check()
                ended = self._collector.advance()
            except BaseException:
                self._collector.cancel_all()  # the slots and workers are free for whoever comes next
                raise
            for attempt, trajectory in ended:
                if trajectory.outcome.is_trained:
                    found.append(trajectory)
                    keep(trajectory)
                    advance(1, {})
                    continue
                outcome = trajectory.outcome
                tell_discarded(self._tell, attempt, outcome)
                if outcome.reason == "outage":  # the pool holds the next attempt until it is over
                    self._collector.admit([attempt])
                elif attempt.retry + 1 < MAX_RETRIES and outcome.reason not in HOPELESS:
                    self._collector.admit([dataclasses.replace(attempt, retry=attempt.retry + 1)])
                else:
                    missing.append(attempt.group_id)
                    self.last_failure = f"{outcome.reason}: {outcome.detail.partition(chr(10))[0]}"
                    advance(1, {})
                    self._tell(
                        "evaluation_task_missing",
                        split=attempt.split,
                        task=attempt.task,
                        reason=outcome.reason,
                        detail=outcome.detail,
                    )
        return conclude(found, missing)


def conclude(trajectories: Iterable[Trajectory], missing: Iterable[int]) -> Evaluation:
    """Make the result of an evaluation from its episodes, in any order, and the places of those missing."""
    # Episodes end in any order; the panels' order makes two evaluations comparable task by task.
    ordered = sorted(trajectories, key=lambda trajectory: (trajectory.group_id, trajectory.member))
    without = tuple(sorted(missing))
    metrics = {"eval_missing": float(len(without))}
    if ordered:
        metrics |= summarize(ordered)
    return Evaluation(metrics, ordered, without)


def summarize(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Average success, return, turns, entropy, invalid actions and environment metrics, as ``eval_*``."""
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    entropies = np.concatenate([turn.entropies for turn in turns])
    values = {
        "eval_success": float(np.mean([t.is_success for t in trajectories])),
        **group_success("eval_success", trajectories),
        "eval_return": float(np.mean([t.episode_return for t in trajectories])),
        "eval_turns": float(np.mean([len(t.turns) for t in trajectories])),
        "eval_entropy": float(entropies.mean()),
        "eval_invalid_actions": float(np.mean([not turn.is_valid for turn in turns])),
    }
    # An environment may report a number for some episodes only; the others do not count as zero.
    for name in sorted({name for t in trajectories for name in t.metrics}):
        values[f"eval_env_{name}"] = float(
            np.mean([t.metrics[name] for t in trajectories if name in t.metrics])
        )
    return values
