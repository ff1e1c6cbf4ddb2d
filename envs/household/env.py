"""The household as a `TextEnv`."""

from __future__ import annotations

import difflib
import functools
from typing import Any

from envs.household import commands, expert, tasks
from envs.household.tables import LEVELS, Level
from envs.household.texts import TEXTS
from envs.household.world import World


class HouseholdEnv:
    """A house full of things, and one sentence that says what to do with them.

    Rewards are 1.0 for the step that meets the goal and 0.0 otherwise. Everything is a function of
    (level, style, split, index); a seed only chooses the index when none is given.

    ``info`` holds ``task`` (the goal sentence), ``family``, ``admissible`` (every command that would do
    something, sorted) and ``won``.
    """

    def __init__(self, level: str = "tiny", style: str = "terse", max_turns: int | None = None) -> None:
        """Chooses what houses look like and how they are told.

        Args:
          level: ``tiny``, ``easy``, ``medium`` or ``hard``.
          style: ``terse`` (the state in few words, for small models) or ``alfworld`` (its sentences).
          max_turns: steps after which an episode is truncated; None takes the level's own limit.

        Raises:
          ValueError: an unknown level or style, or a limit below 1.
        """
        self._level = find_level(level)
        if style not in TEXTS:
            raise ValueError(f"unknown household style {style!r}; the styles are {', '.join(TEXTS)}")
        if max_turns is not None and max_turns < 1:
            raise ValueError(f"household max_turns must be at least 1, not {max_turns}")
        self._texts = TEXTS[style]()
        self._max_turns = self._level.max_turns if max_turns is None else max_turns
        self._draw = tasks.Draw("household", "reset", 0)
        self._game: tasks.Game | None = None
        self._world: World | None = None
        self._turn = 0
        self._is_done = False

    @property
    def max_turns(self) -> int:
        """Steps after which an episode is truncated."""
        return self._max_turns

    def list_splits(self) -> list[str]:
        """``train``, ``valid``, ``test``."""
        return list(tasks.SPLITS)

    def num_tasks(self, split: str) -> int:
        """Size of a panel."""
        return tasks.num_tasks(self._level, split)

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """The whole task: house, goal, sentence and content hash."""
        game = _load(self._level.name, split, index)
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
        """Hash of the ordered content hashes of a panel; generates the whole panel once."""
        tasks.num_tasks(self._level, split)
        return tasks.panel_hash(self._level.name, split)

    def reset(
        self, seed: int | None = None, *, split: str | None = None, index: int | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Starts an episode.

        Args:
          seed: restarts the stream that chooses an index when none is given.
          split: the panel; ``train`` when not given.
          index: the task in its panel.

        Raises:
          ValueError: unknown split.
          IndexError: index outside the panel.
        """
        if seed is not None:
            self._draw = tasks.Draw("household", "reset", seed)
        split = "train" if split is None else split
        if index is None:
            index = self._draw.below(self.num_tasks(split))
        self._game = _load(self._level.name, split, index)
        self._world = World(self._game.scene)
        self._turn = 0
        self._is_done = False
        return self._texts.opening(self._game, self._world), self._info(won=False)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Carries out one command; any other text does nothing and costs the turn.

        Raises:
          RuntimeError: before the first reset, or after the episode ended.
        """
        game, world = self._playing("step")
        command = commands.parse(action)
        if command is not None and not world.apply(command):
            command = None
        self._turn += 1
        won = command is not None and game.goal.is_met(world)
        truncated = not won and self._turn >= self._max_turns
        self._is_done = won or truncated
        observation = self._texts.reply(game, world, command)
        return observation, float(won), won, truncated, self._info(won)

    def expert_action(self) -> str:
        """What the search expert does next, knowing only what has been shown so far.

        Raises:
          RuntimeError: before the first reset, or after the episode ended.
        """
        game, world = self._playing("expert_action")
        return expert.choose_command(world, game.goal)

    def close(self) -> None:
        """Ends the episode."""
        self._game = self._world = None

    def _playing(self, caller: str) -> tuple[tasks.Game, World]:
        if self._game is None or self._world is None:
            raise RuntimeError(f"{caller}() without an episode: call reset() first")
        if self._is_done:
            raise RuntimeError(f"{caller}() after the episode ended: call reset() first")
        return self._game, self._world

    def _info(self, won: bool) -> dict[str, Any]:
        assert self._game is not None and self._world is not None
        return {
            "task": self._game.task,
            "family": self._game.goal.family,
            "admissible": self._world.admissible(),
            "won": won,
        }


def find_level(name: str) -> Level:
    """The preset of that name.

    Raises:
      ValueError: there is none; the nearest known one is named.
    """
    if name in LEVELS:
        return LEVELS[name]
    nearest = difflib.get_close_matches(str(name), LEVELS, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"unknown household level {name!r}{hint} The levels are {', '.join(LEVELS)}")


@functools.lru_cache(maxsize=1024)
def _load(level_name: str, split: str, index: int) -> tasks.Game:
    """A task, generated once for the several attempts that a group makes at it."""
    return tasks.make_game(LEVELS[level_name], split, index)
