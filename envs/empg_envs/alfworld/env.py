"""ALFWorld as a `TextEnv`, with official or generated games."""

from __future__ import annotations

import dataclasses
import os
import warnings

from empg_envs.alfworld.files import VARIABLE, OfficialPanels
from empg_envs.alfworld.generator import GeneratedPanels
from empg_envs.alfworld.release import RELEASES, ReleaseGrammar, ReleaseTexts
from empg_envs.household import expert as search
from empg_envs.household import solver
from empg_envs.household.house import HouseEnv
from empg_envs.household.world import TOOLS, Scene, World

SOURCES = ("official", "generated", "auto")
EXPERTS = {"solver": solver.choose_command, "search": search.choose_command}
MAX_TURNS = 50
LEVEL = "rooms"
# Release 2.1.1 also cleans objects in a sink, not only in its basin.
OLD_TOOLS = {**TOOLS, "clean": TOOLS["clean"] | {"sink"}}


class AlfworldEnv(HouseEnv):
    """ALFWorld with exactly its commands and texts: one room and one task per episode.

    ``info`` has the keys of the household: ``task``, ``group`` (the task family), ``admissible``, ``won``,
    ``milestone``.
    """

    def __init__(
        self,
        source: str | None = None,
        *,
        data: str | None = None,
        level: str = LEVEL,
        release: str = "2.1.2",
        max_turns: int = MAX_TURNS,
        win_reward: float = 1.0,
        expert: str = "solver",
    ) -> None:
        """Set up the games, their texts and the expert.

        Args:
          source: ``official`` (files of ``data``), ``generated``, or ``auto`` (official if there are files,
            else generated, with a warning if ``ALFWORLD_DATA`` names no games). The default is official if
            ``data`` or ``ALFWORLD_DATA`` names a folder.
          data: folder of the official games; the default is the folder in ``ALFWORLD_DATA``.
          level: preset of generated games: a room, ``rooms`` (all four) or ``tiny``.
          release: text release, ``2.1.2`` or ``2.1.1``; files of both releases can be played in either.
          max_turns: number of steps after which an episode is truncated.
          win_reward: reward of the step that meets the goal.
          expert: ``solver`` knows where everything is; ``search`` knows only what the agent has seen.

        Raises:
          ValueError: an option has an unknown value.
          FileNotFoundError: official games are requested, or ``data`` is named, but they are not found.
        """
        for name, value, known in (("release", release, RELEASES), ("expert", expert, tuple(EXPERTS))):
            if value not in known:
                raise ValueError(f"unknown alfworld {name} {value!r}; the choices are {', '.join(known)}")
        super().__init__(
            open_panels(source, data, level),
            ReleaseTexts(release),
            ReleaseGrammar(release),
            EXPERTS[expert],
            max_turns=max_turns,
            win_reward=win_reward,
            name="alfworld",
        )
        self._is_old = release == "2.1.1"

    def _enter(self, scene: Scene) -> World:
        return World(dataclasses.replace(scene, tools=OLD_TOOLS) if self._is_old else scene)


def open_panels(source: str | None, data: str | None, level: str) -> OfficialPanels | GeneratedPanels:
    """Open the panels that the options select.

    Raises:
      ValueError: an unknown source or level, a folder for generated games, or a level for official ones.
      FileNotFoundError: official games are requested, or ``data`` is named, but they are not found.
    """
    generated = GeneratedPanels(level)
    if source is None:
        source = "official" if data is not None or os.environ.get(VARIABLE) else "generated"
    if source not in SOURCES:
        raise ValueError(f"unknown alfworld source {source!r}; the choices are {', '.join(SOURCES)}")
    if source == "generated":
        if data is not None:
            raise ValueError(f"alfworld data={data!r} has no effect with source='generated'")
        return generated
    if source == "official" and level != LEVEL:
        raise ValueError(
            f"alfworld level={level!r} has no effect with official games: set source='generated'"
        )
    try:
        return OfficialPanels(data)
    except FileNotFoundError as error:
        if source == "official" or data is not None:
            raise
        if os.environ.get(VARIABLE):
            warnings.warn(f"{error} Playing generated games.", stacklevel=2)
    return generated
