"""The common base of the household and ALFWorld environments: one episode in a house."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Protocol

from empg_envs.draw import Draw
from empg_envs.household import texts
from empg_envs.household.commands import Command
from empg_envs.household.goals import HouseholdGoal
from empg_envs.household.world import Scene, World


class Game(texts.Game, Protocol):
    """One task: a house, its goal, and the task sentence."""

    @property
    def scene(self) -> Scene:
        """The house."""
        ...


class Panels(Protocol):
    """A source of games."""

    def list_splits(self) -> list[str]:
        """Return the names of the panels."""
        ...

    def num_tasks(self, split: str) -> int:
        """Return the size of a panel.

        Raises:
          ValueError: unknown split.
        """
        ...

    def load(self, split: str, index: int) -> Game:
        """Return one game.

        Raises:
          ValueError: unknown split.
          IndexError: index outside the panel.
        """
        ...

    def describe(self, split: str, index: int) -> dict[str, Any]:
        """Return a JSON-able description of one game, with its ``content_hash``."""
        ...

    def panel_hash(self, split: str) -> str:
        """Return the hash that identifies a panel: a hash over the ordered content hashes of its games."""
        ...


class Grammar(Protocol):
    """The spelling of commands."""

    def parse(self, text: str) -> Command | None:
        """Parse a command; return None if the text is not well formed."""
        ...

    def spell(self, admissible: list[str]) -> list[str]:
        """Return the commands of `World.admissible` in this grammar's spelling, sorted."""
        ...


class HouseEnv:
    """A `TextEnv` over panels of games.

    The reward is ``win_reward`` for the step that meets the goal and 0 otherwise. An episode is a function of
    panels, split and index; a seed only selects an index if none is given.

    ``info`` contains ``task`` (the task sentence), ``group`` (the task family), ``admissible`` (the sorted
    commands that have an effect now), ``won``, ``milestone``: whether this step reached a subgoal for the
    first time in the episode (`HouseholdGoal.milestones`), and ``state``: a hash of the observation, the
    agent's place, what it holds and has ever taken, and ``admissible`` (CRBC's key, arXiv 2609.35082).
    """

    def __init__(
        self,
        panels: Panels,
        style: texts.Texts,
        grammar: Grammar,
        expert: Callable[[World, HouseholdGoal], str],
        *,
        max_turns: int,
        win_reward: float = 1.0,
        name: str = "household",
    ) -> None:
        """Combine the parts of an environment.

        Args:
          panels: the source of games.
          style: the texts for the agent.
          grammar: the spelling of commands.
          expert: function that returns the expert's next command in the spelling of `World.admissible`.
          max_turns: number of steps after which an episode is truncated.
          win_reward: reward of the step that meets the goal.
          name: name of the environment, for messages and as a seed of random indices.

        Raises:
          ValueError: the limit is below 1.
        """
        if max_turns < 1:
            raise ValueError(f"{name} max_turns must be at least 1, not {max_turns}")
        self._panels, self._texts, self._grammar, self._expert = panels, style, grammar, expert
        self._max_turns, self._win_reward, self._name = max_turns, float(win_reward), name
        self._draw = Draw(name, "reset", 0)
        self._game: Game | None = None
        self._world: World | None = None
        self._turn = 0
        self._is_done = False
        self._reached: frozenset[str] = frozenset()
        self._taken: list[str] = []

    @property
    def max_turns(self) -> int:
        """Number of steps after which an episode is truncated."""
        return self._max_turns

    def list_splits(self) -> list[str]:
        """Return the names of the task panels."""
        return self._panels.list_splits()

    def num_tasks(self, split: str) -> int:
        """Return the size of a panel."""
        return self._panels.num_tasks(split)

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """Return the whole task: house, goal, sentence and content hash."""
        return self._panels.describe(split, index)

    def panel_hash(self, split: str) -> str:
        """Return the hash of the ordered content hashes of a panel; this loads the whole panel once."""
        return self._panels.panel_hash(split)

    def reset(
        self, seed: int | None = None, *, split: str | None = None, index: int | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode.

        Args:
          seed: seeds the random choice of an index, for resets without ``index``.
          split: the panel; the default is the first of `list_splits`.
          index: index of the task in its panel.

        Raises:
          ValueError: the split is unknown.
          IndexError: the index is outside of the panel.
        """
        if seed is not None:
            self._draw = Draw(self._name, "reset", seed)
        split = self.list_splits()[0] if split is None else split
        if index is None:
            index = self._draw.below(self.num_tasks(split))
        self._game = self._panels.load(split, index)
        self._world = self._enter(self._game.scene)
        self._turn = 0
        self._is_done = False
        self._reached, self._taken = self._game.goal.milestones(self._world), []
        observation = self._texts.opening(self._game, self._world)
        return observation, self._info(observation, won=False)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Carry out one command; any other text has no effect and costs the turn.

        Raises:
          RuntimeError: before the first reset, or after the end of the episode.
        """
        game, world = self._playing("step")
        command = self._grammar.parse(action)
        held = world.holding
        if command is not None and not world.apply(command):
            command = None
        if world.holding is not None and world.holding != held:
            self._taken.append(world.holding)
        self._turn += 1
        won = command is not None and game.goal.is_met(world)
        truncated = not won and self._turn >= self._max_turns
        self._is_done = won or truncated
        observation = self._texts.reply(game, world, command)
        return observation, self._win_reward * won, won, truncated, self._info(observation, won=won)

    def expert_action(self) -> str:
        """Return the expert's next command.

        Raises:
          RuntimeError: before the first reset, or after the end of the episode.
        """
        game, world = self._playing("expert_action")
        return self._grammar.spell([self._expert(world, game.goal)])[0]

    def close(self) -> None:
        """End the episode."""
        self._game = self._world = None

    def _enter(self, scene: Scene) -> World:
        return World(scene)

    def _playing(self, caller: str) -> tuple[Game, World]:
        if self._game is None or self._world is None:
            raise RuntimeError(f"{caller}() without an episode: call reset() first")
        if self._is_done:
            raise RuntimeError(f"{caller}() after the episode ended: call reset() first")
        return self._game, self._world

    def _info(self, observation: str, *, won: bool) -> dict[str, Any]:
        assert self._game is not None and self._world is not None
        before, admissible = self._reached, self._grammar.spell(self._world.admissible())
        state = (observation, self._world.location, self._world.holding, self._taken, admissible)
        self._reached = before | self._game.goal.milestones(self._world)
        return {
            "task": self._game.task,
            "group": self._game.goal.family,
            "admissible": admissible,
            "won": won,
            "milestone": self._reached != before,
            "state": hashlib.blake2b(repr(state).encode(), digest_size=8).hexdigest(),
        }
