"""Observations in two styles: ALFWorld's feedback texts, or a terse view of the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from empg_envs.household.commands import Command
from empg_envs.household.goals import HouseholdGoal
from empg_envs.household.world import World

NOTHING_HAPPENS = "Nothing happens."

HELP = """Available commands:
  look:                             look around your current location
  inventory:                        check your current inventory
  go to (receptacle):               move to a receptacle
  open (receptacle):                open a receptacle
  close (receptacle):               close a receptacle
  take (object) from (receptacle):  take an object from a receptacle
  move (object) to (receptacle):  place an object in or on a receptacle
  examine (something):              examine a receptacle or an object
  use (object):                     use an object
  heat (object) with (receptacle):  heat an object using a receptacle
  clean (object) with (receptacle): clean an object using a receptacle
  cool (object) with (receptacle):  cool an object using a receptacle
  slice (object) with (object):     slice an object using a sharp object
"""


class Game(Protocol):
    """The parts of a game that the texts need."""

    @property
    def task(self) -> str:
        """The task sentence."""
        ...

    @property
    def goal(self) -> HouseholdGoal:
        """The goal."""
        ...


class Texts(Protocol):
    """A style of observation."""

    def opening(self, game: Game, world: World) -> str:
        """Return the first observation of an episode: rooms, receptacles, task."""
        ...

    def reply(self, game: Game, world: World, command: Command | None) -> str:
        """Return the observation after a command; ``command`` is None if nothing happened."""
        ...


def list_names(names: Sequence[str]) -> str:
    """Return ``a x 2, a x 1, and a y 1``, or ``nothing``."""
    if not names:
        return "nothing"
    if len(names) == 1:
        return f"a {names[0]}"
    return ", ".join(f"a {name}" for name in names[:-1]) + f", and a {names[-1]}"


class AlfworldTexts:
    """The feedback of ALFWorld 2.1.2, except that the view of the whole house is divided into rooms."""

    def opening(self, game: Game, world: World) -> str:
        """Return the description of the house, then the task sentence after ``Your task is to:``."""
        return f"-= Welcome to the household! =-\n\n{self._house(world)}\n\nYour task is to: {game.task}"

    def reply(self, game: Game, world: World, command: Command | None) -> str:
        """Return ALFWorld's sentence for the command."""
        if command is None:
            return NOTHING_HAPPENS
        verb, first, second = command
        if verb == "go to":
            return f"You arrive at {self._arrival(world, first)}. {self._receptacle(world, first)}"
        if verb == "open":
            return f"You open the {first}. {self._receptacle(world, first)}"
        if verb == "close":
            return f"You close the {first}."
        if verb == "take":
            return f"You pick up the {first} from the {second}."
        if verb == "move":
            return self._move(first, second)
        if verb == "use":
            return f"You turn on the {first}."
        if verb == "slice":
            return f"You sliced the {first} with the {second}."
        if verb in ("clean", "heat", "cool"):
            return f"You {verb} the {first} using the {second}."
        if verb == "examine":
            return self._receptacle(world, first) if first in world.contents else self._object(world, first)
        if verb == "inventory":
            return (
                f"You are carrying: a {world.holding}." if world.holding else "You are not carrying anything."
            )
        return self._look(world) if verb == "look" else HELP

    def _arrival(self, world: World, receptacle: str) -> str:
        return receptacle

    def _move(self, thing: str, receptacle: str) -> str:
        return f"You move the {thing} to the {receptacle}."

    def _house(self, world: World) -> str:
        rooms = " ".join(
            f"In the {room}, you see {list_names(names)}." for room, names in world.scene.rooms.items()
        )
        return f"You are in the middle of a house. {rooms}"

    def _look(self, world: World) -> str:
        if not world.here:
            return self._house(world)
        *others, last = world.here
        names = ", ".join(others) + f", and {last}" if others else last
        return f"You are facing the {names}. Next to it, you see {list_names(world.displaced())}."

    def _receptacle(self, world: World, receptacle: str) -> str:
        if not world.is_accessible(receptacle):
            return f"The {receptacle} is closed."
        names = list_names(world.contents[receptacle])
        if receptacle in world.scene.openable:
            return f"The {receptacle} is open. In it, you see {names}."
        return f"On the {receptacle}, you see {names}."

    def _object(self, world: World, thing: str) -> str:
        if thing in world.scene.vessels:  # ALFWorld describes the contents of vessels
            inside = list_names(world.scene.inside.get(thing, ()))
            return f"This is a normal {thing}. In it, you see {inside}."
        cleanliness = "clean" if thing in world.clean else ""
        sliced = "sliced" if thing in world.sliced else ""
        warmth = "hot" if thing in world.hot else "cool" if thing in world.cool else ""
        if warmth == "cool" and not cleanliness and not sliced:
            warmth = "cold"
        states = " and ".join(filter(None, (warmth, cleanliness)))
        if not states and not sliced:
            is_on = thing in world.toggled
            return f"This {thing} is on." if is_on else f"There's nothing special about {thing}."
        return f"This is a {' '.join(filter(None, (states, sliced, thing)))}."


class TerseTexts:
    """The whole state in few words after every command.

    An example is ``at sofa 1 : egg 1 mug 1 . holding nothing . put apple 1 in desk 1``: the agent's place and
    the visible objects, the carried object, then the goal. The goal comes last, next to the decision. If a
    class has only one instance in the house, the goal uses the full name of this instance. The policy then
    compares equal tokens.
    """

    def opening(self, game: Game, world: World) -> str:
        """Return the rooms with their receptacles, then the state."""
        rooms = " ".join(f"{room} : {' '.join(names)} ." for room, names in world.scene.rooms.items())
        return f"{rooms} {self.reply(game, world, Command('look'))}"

    def reply(self, game: Game, world: World, command: Command | None) -> str:
        """Return the state, after ``nothing happens .`` if the command had no effect."""
        goal = game.goal.terse(self._name(world, game.goal.thing), self._name(world, game.goal.target))
        view = f"at {self._surroundings(world)} . holding {self._carried(world)} . {goal}"
        return view if command is not None else f"nothing happens . {view}"

    def _name(self, world: World, cls: str) -> str:
        only = f"{cls} 1"
        return cls if f"{cls} 2" in world.scene.class_of else only

    def _carried(self, world: World) -> str:
        thing = world.holding
        if thing is None:
            return "nothing"
        warmth = "hot " if thing in world.hot else "cool " if thing in world.cool else ""
        return f"{warmth}{'clean ' if thing in world.clean else ''}{thing}"

    def _surroundings(self, world: World) -> str:
        if not world.here:
            return "door"
        parts = []
        for receptacle in world.here:
            inside = " ".join(world.contents[receptacle]) or "nothing"
            parts.append(f"{receptacle} : {inside if world.is_accessible(receptacle) else 'closed'}")
        return " ".join(parts)


TEXTS: dict[str, type[Texts]] = {"terse": TerseTexts, "alfworld": AlfworldTexts}
