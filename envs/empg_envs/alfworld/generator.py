"""Panels of generated games. Each game passes through the file format of the official ones."""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Sequence
from typing import Any

from empg_envs.alfworld.game import Game, parse_game
from empg_envs.alfworld.rooms import PRESETS
from empg_envs.alfworld.writer import make_content
from empg_envs.household import tasks
from empg_envs.names import look_up


class GeneratedPanels:
    """Train, valid and test games of a preset, disjoint by content.

    The rooms of a preset alternate: game ``i`` has room ``i mod n``. As in the household's panels
    (`empg_envs.household.tasks`), only the hash of the content decides the split, and every game has a goal
    that is reachable and not met at the start.
    """

    def __init__(self, level: str = "rooms") -> None:
        """Set the preset.

        Args:
          level: a key of `PRESETS`.

        Raises:
          ValueError: the level is unknown; the message suggests the nearest one.
        """
        self._name, self._levels = level, look_up("alfworld level", level, PRESETS)

    def list_splits(self) -> list[str]:
        """Return ``train``, ``valid``, ``test``."""
        return list(tasks.SPLITS)

    def num_tasks(self, split: str) -> int:
        """Return the size of a panel."""
        return sum(tasks.num_tasks(level, split) for level in self._levels)

    def make(self, split: str, index: int) -> tasks.Game:
        """Generate one game before it is written, with the household's order of listing.

        Raises:
          ValueError: unknown split.
          IndexError: index outside the panel.
        """
        count, index = self.num_tasks(split), operator.index(index)
        if not 0 <= index < count:
            raise IndexError(f"task index {index} of split {split!r} is outside [0, {count})")
        turn, room = divmod(index, len(self._levels))
        return tasks.make_game(self._levels[room], split, turn)

    def content(self, split: str, index: int) -> dict[str, Any]:
        """Return the content that the game's file would have."""
        return make_content(self.make(split, index))

    def load(self, split: str, index: int) -> Game:
        """Return one game; it is cached, because a group plays the same game several times."""
        return _load(self._name, split, index)

    def describe(self, split: str, index: int) -> dict[str, Any]:
        """Return room, goal, sentence and content hash."""
        game = self.load(split, index)
        return {
            "source": "generated",
            "level": self._name,
            "split": split,
            "index": index,
            "task": game.task,
            "group": game.goal.family,
            "thing": game.goal.thing,
            "target": game.goal.target,
            "contents": {name: list(inside) for name, inside in game.scene.start.items()},
            "content_hash": self.make(split, index).content_hash,
        }

    def panel_hash(self, split: str) -> str:
        """Return the hash of the ordered content hashes; generates the whole panel."""
        hashes: Sequence[str] = [self.make(split, i).content_hash for i in range(self.num_tasks(split))]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()


@functools.lru_cache(maxsize=1024)
def _load(name: str, split: str, index: int) -> Game:
    return parse_game(GeneratedPanels(name).content(split, index))
