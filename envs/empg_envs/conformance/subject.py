"""An environment under test, and how its episodes are played for comparisons."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from empg_envs import make_env, resolve_spec
from empg_envs.base import EnvSpec, TextEnv

MOVES = 12  # most actions of an episode that is played for a comparison


@dataclasses.dataclass(frozen=True)
class Subject:
    """An environment under test.

    Attributes:
      target: its name or entry point.
      options: keyword arguments of the environment.
      prompt_options: keyword arguments of its prompt builder and parser.
      episodes: number of tasks of each split that are played.
    """

    target: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    episodes: int = 3

    @functools.cached_property
    def spec(self) -> EnvSpec:
        """The environment's spec."""
        return resolve_spec(self.target)

    def make(self) -> TextEnv:
        """Build the environment."""
        return make_env(self.target, **self.options)

    @contextlib.contextmanager
    def open(self) -> Iterator[TextEnv]:
        """Build the environment, and close it in the end; like a worker, pass over what ``close`` raises."""
        env = self.make()
        try:
            yield env
        finally:
            with contextlib.suppress(Exception):
                env.close()

    def tasks(self, env: TextEnv) -> list[tuple[str, int]]:
        """Return the tasks that are played: the first ones of every split."""
        return [
            (split, index)
            for split in env.list_splits()
            for index in range(min(self.episodes, env.num_tasks(split)))
        ]


def play(env: TextEnv, split: str, index: int, actions: int = MOVES) -> list[str]:
    """Play an episode, at most so many actions of it; return every reply as canonical JSON."""
    log: list[str] = []
    for _ in range(1 + actions):
        advance(env, split, index, log)
    return log


def advance(env: TextEnv, split: str, index: int, log: list[str]) -> None:
    """Play one move of an episode, and add the reply to its log as canonical JSON.

    Without a log it is the reset; after the end it is nothing. A fixed rule chooses among the admissible
    actions, so that the log alone says what comes next.
    """
    if not log:
        log.append(json.dumps(env.reset(seed=0, split=split, index=index), sort_keys=True))
        return
    *reply, info = json.loads(log[-1])
    if any(reply[2:]):
        return
    admissible = info.get("admissible") or ["look"]
    action = admissible[(7 * (len(log) - 1) + index) % len(admissible)]
    log.append(json.dumps(env.step(action), sort_keys=True))
