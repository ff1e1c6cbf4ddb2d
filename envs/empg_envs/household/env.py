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
    """A house full of things, and one sentence that says what to do with them.

    Everything is a function of (level, style, split, index). The expert searches: it knows only what has
    been shown so far.
    """

    def __init__(self, level: str = "tiny", style: str = "terse", max_turns: int | None = None) -> None:
        """Choose what houses look like and how they are told.

        Args:
          level: ``tiny``, ``easy``, ``medium`` or ``hard``.
          style: ``terse`` (the state in few words, for small models) or ``alfworld`` (its sentences).
          max_turns: steps after which an episode is truncated; None takes the level's own limit.

        Raises:
          ValueError: an unknown level or style, or a limit below 1.
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
        """Initialize with ``level``: what houses look like."""
        self._level = level

    def list_splits(self) -> list[str]:
        """Return ``train``, ``valid``, ``test``."""
        return list(tasks.SPLITS)

    def num_tasks(self, split: str) -> int:
        """Return the size of a panel."""
        return tasks.num_tasks(self._level, split)

    def load(self, split: str, index: int) -> tasks.Game:
        """Return a task, generated once for the several attempts that a group makes at it."""
        return _load(self._level.name, split, index)

    def describe(self, split: str, index: int) -> dict[str, Any]:
        """Return house, goal, sentence and content hash."""
        game = self.load(split, index)
        return {
            "level": self._level.name,
            "split": split,
            "index": index,
            "task": game.task,
            "family": game.goal.family,
            "thing": game.goal.thing,
            "target": game.goal.target,
            "rooms": {room: list(names) for room, names in game.scene.rooms.items()},
            "contents": {name: list(inside) for name, inside in game.scene.start.items()},
            "content_hash": game.content_hash,
        }

    def panel_hash(self, split: str) -> str:
        """Return the identity of a panel; generates the whole panel once."""
        tasks.num_tasks(self._level, split)
        return tasks.panel_hash(self._level.name, split)


def find_level(name: str) -> Level:
    """Return the preset of that name; an unknown one is a `ValueError` that names the nearest."""
    return look_up("household level", name, LEVELS)


@functools.lru_cache(maxsize=1024)
def _load(level_name: str, split: str, index: int) -> tasks.Game:
    return tasks.make_game(LEVELS[level_name], split, index)
