"""Stored episodes in place of an environment: training on what another policy has played."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence

from empg_jax.engine.interface import SamplingEngine
from empg_jax.errors import ConfigError
from empg_jax.rollout.episode import Attempt
from empg_jax.rollout.schedule import Round
from empg_jax.types import Trajectory
from empg_jax.workers.pool import EnvPool


def group_episodes(
    trajectories: Sequence[Trajectory], *, group_size: int, max_tokens: int, max_turns: int, vocab_size: int
) -> list[list[Trajectory]]:
    """Sort stored episodes into groups of ``group_size``, and check that this run can train on them.

    Args:
      trajectories: the stored episodes, with their group and member.
      group_size: attempts of each task; further ones are left out.
      max_tokens: longest conversation of this run.
      max_turns: most turns of an episode of this run.
      vocab_size: number of the model's token ids.

    Raises:
      ConfigError: a group has too few episodes; an episode is too long or of another vocabulary.
    """
    groups: dict[int, list[Trajectory]] = collections.defaultdict(list)
    for trajectory in trajectories:
        groups[trajectory.group_id].append(trajectory)
        where = f"rollout.stored: group {trajectory.group_id}, member {trajectory.member}"
        if len(trajectory.turns) > max_turns:
            raise ConfigError(f"{where} has {len(trajectory.turns)} turns, but env.max_turns={max_turns}")
        for turn in trajectory.turns:
            length = len(turn.prompt_tokens) + len(turn.response_tokens)
            if length > max_tokens:
                raise ConfigError(f"{where} has {length} tokens, but rollout.max_tokens={max_tokens}")
            largest = max(turn.prompt_tokens.max(initial=0), turn.response_tokens.max(initial=0))
            if largest >= vocab_size:
                raise ConfigError(
                    f"{where} has token {largest}, but the model knows {vocab_size}: it was played with "
                    "another tokenizer"
                )
    small = {group: len(members) for group, members in groups.items() if len(members) < group_size}
    if small or not groups:
        found = f"group {min(small)} has {small[min(small)]}" if small else "there is none"
        raise ConfigError(f"rollout.stored: rollout.group_size={group_size} episodes a group, but {found}")
    ordered = (sorted(groups[group], key=lambda t: t.member) for group in sorted(groups))
    return [members[:group_size] for members in ordered]


class StoredCollector:
    """A player of attempts that looks them up; otherwise as `Collector`.

    Args:
      engine: takes the new weights, for whoever samples with them.
      pool: the environment workers; evaluations use them.
      groups: the stored episodes; an attempt's task is a place in this list.
    """

    def __init__(self, engine: SamplingEngine, pool: EnvPool, groups: Sequence[Sequence[Trajectory]]) -> None:
        self.engine, self.pool = engine, pool
        self.served = self.aged = 0.0  # nothing takes time here
        self.check: Callable[[], None] = lambda: None  # and nothing waits
        self.answered: list[int] = []
        self._groups = groups
        self._queue: list[Attempt] = []

    @property
    def in_flight(self) -> int:
        """Number of attempts that were admitted and have not ended."""
        return len(self._queue)

    def admit(self, attempts: Iterable[Attempt]) -> None:
        """Queue attempts."""
        self._queue.extend(attempts)

    def cancel(self, group_id: int) -> int:
        """Give up the unfinished attempts of a group; nothing was sampled for them."""
        self._queue = [attempt for attempt in self._queue if attempt.group_id != group_id]
        return 0

    def cancel_all(self) -> None:
        """Give up everything in flight."""
        self._queue.clear()

    def ages(self) -> dict[Attempt, float]:
        """Return nothing: no attempt takes time."""
        return {}

    def settle(self) -> None:
        """Do nothing: no response is ever in progress."""

    def advance(self, wanted: Round | None = None) -> list[tuple[Attempt, Trajectory]]:
        """Return the stored episode of every attempt. It counts as sampled before the run, by version 0."""
        queue, self._queue = self._queue, []
        return [(attempt, self._look_up(attempt)) for attempt in queue]

    def _look_up(self, attempt: Attempt) -> Trajectory:
        stored = self._groups[attempt.task][attempt.member]
        turns = tuple(dataclasses.replace(turn, version=0, versions=None) for turn in stored.turns)
        return dataclasses.replace(stored, group_id=attempt.group_id, member=attempt.member, turns=turns)
