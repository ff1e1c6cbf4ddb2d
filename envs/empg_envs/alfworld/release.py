"""The commands and texts of ALFWorld's two text releases.

Both releases have the same games. Release 2.1.1 has ``put X in/on Y`` instead of ``move X to Y`` in 2.1.2,
names a place by its location (``loc 12``) instead of its receptacle, and has no ``help``. Files of either
release can be played with the texts of the other one, because only the problem and the task sentence are read
from a file.
"""

from __future__ import annotations

import re

from empg_envs.household import commands
from empg_envs.household.commands import Command
from empg_envs.household.texts import AlfworldTexts, Game, list_names
from empg_envs.household.world import World

RELEASES = ("2.1.2", "2.1.1")

_PUT = re.compile(r"put ([a-z]+ [0-9]+) in/on ([a-z]+ [0-9]+)")


class ReleaseTexts(AlfworldTexts):
    """ALFWorld's exact texts in one release."""

    def __init__(self, release: str = "2.1.2") -> None:
        """Set the release, one of `RELEASES`."""
        self._is_old = release == "2.1.1"

    def opening(self, game: Game, world: World) -> str:
        """Return the receptacles of the room, then the task sentence."""
        seen = list_names([name for names in world.scene.rooms.values() for name in names])
        room = self._look(world) if world.here else self._room(seen)
        return f"-= Welcome to TextWorld, ALFRED! =-\n\n{room}\n\nYour task is to: {game.task}"

    def _house(self, world: World) -> str:
        # As in ALFWorld, looking around at a place without receptacles shows none of the room's receptacles.
        return self._room("nothing")

    def _room(self, seen: str) -> str:
        return f"You are in the middle of a room. Looking quickly around you, you see {seen}."

    def _arrival(self, world: World, receptacle: str) -> str:
        return world.scene.location_of[receptacle] if self._is_old else receptacle

    def _move(self, thing: str, receptacle: str) -> str:
        if self._is_old:
            return f"You put the {thing} in/on the {receptacle}."
        return super()._move(thing, receptacle)


class ReleaseGrammar:
    """The exact commands of a release: case and inner blanks matter, outer blanks do not."""

    def __init__(self, release: str = "2.1.2") -> None:
        """Set the release, one of `RELEASES`."""
        self._is_old = release == "2.1.1"

    def parse(self, text: str) -> Command | None:
        """Parse a command; return None if this release has no such command."""
        text = text.strip()
        if not self._is_old:
            return commands.parse_exact(text)
        put = _PUT.fullmatch(text)
        if put is not None:
            return Command("move", *put.groups())
        command = commands.parse_exact(text)
        return None if command is not None and command.verb in ("move", "help") else command

    def spell(self, admissible: list[str]) -> list[str]:
        """Return the commands of `World.admissible` in this release's wording, sorted."""
        if not self._is_old:
            return admissible
        return sorted(_as_old(command) for command in admissible if command != "help")


def _as_old(command: str) -> str:
    if not command.startswith("move "):
        return command
    thing, receptacle = command.removeprefix("move ").split(" to ")
    return f"put {thing} in/on {receptacle}"
