"""An environment under test, and how its episodes are played for comparisons."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
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

    def tasks(self, env: TextEnv) -> list[tuple[str, int]]:
        """Return the tasks that are played: the first ones of every split."""
        return [
            (split, index)
            for split in env.list_splits()
            for index in range(min(self.episodes, env.num_tasks(split)))
        ]


def play(env: TextEnv, split: str, index: int, actions: int = MOVES) -> list[str]:
    """Play an episode by a fixed rule over admissible actions; return every reply as canonical JSON."""
    observation, info = env.reset(seed=0, split=split, index=index)
    log = [json.dumps([observation, info], sort_keys=True)]
    for turn in range(actions):
        admissible = info.get("admissible") or ["look"]
        reply = env.step(admissible[(7 * turn + index) % len(admissible)])
        log.append(json.dumps(reply, sort_keys=True))
        info = reply[4]
        if reply[2] or reply[3]:
            break
    return log
