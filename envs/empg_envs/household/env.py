"""The generated household as a `TextEnv`."""

from __future__ import annotations

import functools
from typing import Any

from empg_envs.household import commands, expert, tasks
from empg_envs.household.house import HouseEnv
from empg_envs.household.tables import LEVELS, Level
from empg_envs.household.texts import TEXTS
from empg_envs.names import look_up


class HouseholdEnv(HouseEnv):
    """A generated house with objects, and a task sentence about them.

    Everything is a function of (level, style, split, index). The expert is the search expert, which uses only
    what the agent has seen so far.
    """

    def __init__(self, level: str = "tiny", style: str = "terse", max_turns: int | None = None) -> None:
        """Set the level of the houses and the style of the texts.

        Args:
          level: ``tiny``, ``easy``, ``medium`` or ``hard``.
          style: ``terse`` (the state in few words, for small models) or ``alfworld`` (ALFWorld's sentences).
          max_turns: number of steps after which an episode is truncated; None takes the level's limit.

        Raises:
          ValueError: the level or style is unknown, or the limit is below 1.
        """
        preset = find_level(level)
        if style not in TEXTS:
            raise ValueError(f"unknown household style {style!r}; the styles are {', '.join(TEXTS)}")
        super().__init__(
            GeneratedPanels(preset),
            TEXTS[style](),
            commands.Lenient(),
            expert.choose_command,
            max_turns=preset.max_turns if max_turns is None else max_turns,
        )


class GeneratedPanels:
    """The panels of a level."""

    def __init__(self, level: Level) -> None:
        """Set the level of the houses."""
        self._level = level

    def list_splits(self) -> list[str]:
        """Return ``train``, ``valid``, ``test``."""
        return list(tasks.SPLITS)

    def num_tasks(self, split: str) -> int:
        """Return the size of a panel."""
        return tasks.num_tasks(self._level, split)

    def load(self, split: str, index: int) -> tasks.Game:
        """Generate a task; it is cached, because a group plays the same task several times."""
        return _load(self._level.name, split, index)

    def describe(self, split: str, index: int) -> dict[str, Any]:
        """Return house, goal, sentence and content hash."""
        game = self.load(split, index)
        return {
            "level": self._level.name,
            "split": split,
            "index": index,
            "task": game.task,
            "group": game.goal.family,
            "thing": game.goal.thing,
            "target": game.goal.target,
            "rooms": {room: list(names) for room, names in game.scene.rooms.items()},
            "contents": {name: list(inside) for name, inside in game.scene.start.items()},
            "content_hash": game.content_hash,
        }

    def panel_hash(self, split: str) -> str:
        """Return the hash that identifies a panel; this generates the whole panel once."""
        tasks.num_tasks(self._level, split)
        return tasks.panel_hash(self._level.name, split)


def find_level(name: str) -> Level:
    """Return the preset of that name; an unknown name raises a `ValueError` with the nearest one."""
    return look_up("household level", name, LEVELS)


@functools.lru_cache(maxsize=1024)
def _load(level_name: str, split: str, index: int) -> tasks.Game:
    return tasks.make_game(LEVELS[level_name], split, index)
