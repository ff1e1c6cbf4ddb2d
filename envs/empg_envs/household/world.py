"""The household engine: the scene, the state, and the effects of commands.

A `Scene` never changes during an episode. It comes from the generator (`tasks`) or from an official game file
(`empg_envs.alfworld`). A `World` is the state of one episode: plain sets and dictionaries keyed by display
names (``fridge 1``). `texts` writes the observations.

The rules are those of ALFWorld. The agent reaches every receptacle in one step and carries at most one
object. Closed receptacles hide their contents. Heating undoes cooling, and cooling undoes heating. A lamp
that is on stays on. The commands clean, heat, cool and use work even if a door is closed. An impossible
command changes nothing. Official games also put one object into two receptacles, or at a place without a
receptacle; `World.spots` and `World.left` represent these cases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from empg_envs.household.commands import Command


class Goal(Protocol):
    """The goal of an episode."""

    def is_met(self, world: World) -> bool:
        """Return whether the world meets the goal."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """The constant part of a game.

    Attributes:
      rooms: room name -> its receptacles; rooms only group receptacles in texts.
      class_of: class of every receptacle and object, by display name.
      order: position of every object in listings.
      location_of: location of every receptacle; several may share one.
      at_location: receptacles of every location, in listing order.
      openable: receptacles with a door.
      start: contents of every receptacle at the start, in listing order.
      fits: pairs (receptacle class, object class) for which the receptacle accepts the object.
      pickupable, toggleable, cleanable, heatable, coolable, sliceable, knives, vessels: objects by their
        properties. Vessels (cups, bowls) differ only in ALFWorld's description of them.
      start_at: location of the agent at the start; None is no particular location.
      spots: pairs (object, location) at the start; None derives them from the receptacles' contents.
      initial: objects and receptacles that have a state at the start, by the state's name in `World`.
      inside: contents of the vessels, which no command changes.
      tools: receptacle classes that clean, heat or cool.
    """

    rooms: Mapping[str, tuple[str, ...]]
    class_of: Mapping[str, str]
    order: Mapping[str, int]
    location_of: Mapping[str, str]
    at_location: Mapping[str, tuple[str, ...]]
    openable: frozenset[str]
    start: Mapping[str, tuple[str, ...]]
    fits: frozenset[tuple[str, str]]
    pickupable: frozenset[str]
    toggleable: frozenset[str]
    cleanable: frozenset[str]
    heatable: frozenset[str]
    coolable: frozenset[str]
    sliceable: frozenset[str]
    knives: frozenset[str]
    vessels: frozenset[str]
    start_at: str | None = None
    spots: frozenset[tuple[str, str]] | None = None
    initial: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)
    inside: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    tools: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=lambda: TOOLS)

    def __post_init__(self) -> None:
        """Derive the objects' locations if they are not given."""
        if self.spots is None:
            spots = ((t, self.location_of[r]) for r, things in self.start.items() for t in things)
            object.__setattr__(self, "spots", frozenset(spots))


class World:
    """State of one episode.

    Attributes:
      scene: the constant part of the game.
      location: the agent's location; None before the first ``go to``.
      holding: the carried object, or None.
      contents: receptacle -> the objects in it, in listing order.
      opened: open receptacles among the openable ones.
      clean, hot, cool, toggled, sliced: objects by state.
      seen: receptacles whose contents have been shown to the agent.
      spots: pairs (object, location).
      left: pairs (object, receptacle) of objects that were taken out and not put back.
    """

    __slots__ = (
        *("scene", "location", "holding", "contents", "opened", "seen"),
        *("clean", "hot", "cool", "toggled", "sliced", "spots", "left"),
    )

    def __init__(self, scene: Scene) -> None:
        """Start with the scene's initial state: nothing carried, nothing seen."""
        self.scene = scene
        self.location = scene.start_at
        self.holding: str | None = None
        self.contents = {receptacle: list(things) for receptacle, things in scene.start.items()}
        self.seen: set[str] = set()
        self.spots: set[tuple[str, str]] = set(scene.spots or ())
        self.left: set[tuple[str, str]] = set()
        initial, none = scene.initial, frozenset[str]()
        self.opened = set(initial.get("opened", none))
        self.clean = set(initial.get("clean", none))
        self.hot = set(initial.get("hot", none))
        self.cool = set(initial.get("cool", none))
        self.toggled = set(initial.get("toggled", none))
        self.sliced = set(initial.get("sliced", none))

    @property
    def here(self) -> tuple[str, ...]:
        """Receptacles at the agent's location."""
        return self.scene.at_location.get(self.location, ()) if self.location is not None else ()

    def is_accessible(self, receptacle: str) -> bool:
        """Return whether the agent could see and reach into a receptacle if it were at its location."""
        return receptacle not in self.scene.openable or receptacle in self.opened

    def is_fitting(self, thing: str, receptacle: str) -> bool:
        """Return whether a receptacle accepts an object."""
        class_of = self.scene.class_of
        return (class_of[receptacle], class_of[thing]) in self.scene.fits

    def is_here(self, thing: str) -> bool:
        """Return whether an object is at the agent's location, even inside a closed receptacle."""
        return self.location is not None and (thing, self.location) in self.spots

    def displaced(self) -> list[str]:
        """Return the objects at this location that were taken out of a receptacle at this location.

        An object occurs once for each such receptacle. ALFWorld lists these objects as lying next to the
        receptacles.
        """
        if not self.left:
            return []
        found = [thing for thing, receptacle in self.left if receptacle in self.here and self.is_here(thing)]
        return sorted(found, key=self.scene.order.__getitem__)

    def apply(self, command: Command) -> bool:
        """Carry out a command.

        Returns:
          Whether the command was possible: True exactly for the commands of `admissible`. False means that
          nothing changed.
        """
        verb, first, second = command
        rule = _RULES.get(verb)
        return True if rule is None else rule(self, first, second)

    def admissible(self) -> list[str]:
        """Return every command that is possible now, sorted and without duplicates."""
        scene, holding = self.scene, self.holding
        location_of, here = scene.location_of, self.here
        found = ["look", "inventory", "help"]
        found += [f"go to {name}" for name, place in location_of.items() if place != self.location]
        if holding is not None:
            found.append(f"examine {holding}")
        for receptacle in here:
            found.append(f"examine {receptacle}")
            if receptacle in scene.openable:
                found.append(f"close {receptacle}" if receptacle in self.opened else f"open {receptacle}")
            if self.is_accessible(receptacle):
                if holding is None:
                    found += [
                        f"take {thing} from {receptacle}"
                        for thing in self.contents[receptacle]
                        if thing in scene.pickupable
                    ]
                elif self.is_fitting(holding, receptacle):
                    found.append(f"move {holding} to {receptacle}")
            if scene.toggleable:
                found += [f"use {thing}" for thing in self.contents[receptacle] if thing in scene.toggleable]
            if holding is not None:
                for verb, things in CHANGES.items():
                    if scene.class_of[receptacle] in scene.tools[verb] and holding in getattr(scene, things):
                        found.append(f"{verb} {holding} with {receptacle}")
        if holding in scene.knives:
            found += [f"slice {thing} with {holding}" for thing in scene.sliceable if self.is_here(thing)]
        # An object in two receptacles at this place gives its commands twice.
        return sorted(set(found) if len(here) > 1 else found)

    def _show(self, receptacle: str) -> None:
        if self.is_accessible(receptacle):
            self.seen.add(receptacle)

    def _go(self, receptacle: str, _: str) -> bool:
        place = self.scene.location_of.get(receptacle)
        if place is None or place == self.location:
            return False
        self.location = place
        self._show(receptacle)
        return True

    def _open(self, receptacle: str, _: str) -> bool:
        if receptacle not in self.here or receptacle not in self.scene.openable or receptacle in self.opened:
            return False
        self.opened.add(receptacle)
        self._show(receptacle)
        return True

    def _close(self, receptacle: str, _: str) -> bool:
        if receptacle not in self.here or receptacle not in self.opened:
            return False
        self.opened.remove(receptacle)
        return True

    def _take(self, thing: str, receptacle: str) -> bool:
        if self.holding is not None or receptacle not in self.here or not self.is_accessible(receptacle):
            return False
        if thing not in self.contents[receptacle] or thing not in self.scene.pickupable:
            return False
        self.contents[receptacle].remove(thing)
        self.left.add((thing, receptacle))
        self.spots.discard((thing, self.scene.location_of[receptacle]))
        self.holding = thing
        return True

    def _move(self, thing: str, receptacle: str) -> bool:
        if self.holding is None or self.holding != thing or receptacle not in self.here:
            return False
        if not self.is_accessible(receptacle) or not self.is_fitting(thing, receptacle):
            return False
        if thing not in self.contents[receptacle]:
            self.contents[receptacle].append(thing)
            self.contents[receptacle].sort(key=self.scene.order.__getitem__)
        self.left.discard((thing, receptacle))
        self.spots.add((thing, self.scene.location_of[receptacle]))
        self.holding = None
        return True

    def _examine(self, name: str, _: str) -> bool:
        if name in self.here:
            self._show(name)
            return True
        return name == self.holding

    def _use(self, thing: str, _: str) -> bool:
        if thing not in self.scene.toggleable or not any(thing in self.contents[r] for r in self.here):
            return False
        self.toggled.add(thing)
        return True

    def _is_tool(self, thing: str, receptacle: str, verb: str) -> bool:
        return (
            thing == self.holding
            and receptacle in self.here
            and self.scene.class_of[receptacle] in self.scene.tools[verb]
            and thing in getattr(self.scene, CHANGES[verb])
        )

    def _clean(self, thing: str, receptacle: str) -> bool:
        if not self._is_tool(thing, receptacle, "clean"):
            return False
        self.clean.add(thing)
        return True

    def _heat(self, thing: str, receptacle: str) -> bool:
        if not self._is_tool(thing, receptacle, "heat"):
            return False
        self.hot.add(thing)
        self.cool.discard(thing)
        return True

    def _cool(self, thing: str, receptacle: str) -> bool:
        if not self._is_tool(thing, receptacle, "cool"):
            return False
        self.cool.add(thing)
        self.hot.discard(thing)
        return True

    def _slice(self, thing: str, knife: str) -> bool:
        if knife != self.holding or knife not in self.scene.knives or thing not in self.scene.sliceable:
            return False
        if not self.is_here(thing):
            return False
        self.sliced.add(thing)
        return True


# Command verb -> the scene's set of objects that allow it.
CHANGES = {"clean": "cleanable", "heat": "heatable", "cool": "coolable"}
# Command verb -> the receptacle classes that it needs.
TOOLS: Mapping[str, frozenset[str]] = {
    "clean": frozenset({"sinkbasin"}),
    "heat": frozenset({"microwave"}),
    "cool": frozenset({"fridge"}),
}

# Verbs without a rule (look, inventory, help) are always possible and have no effect.
_RULES = {
    "go to": World._go,
    "open": World._open,
    "close": World._close,
    "take": World._take,
    "move": World._move,
    "examine": World._examine,
    "use": World._use,
    "clean": World._clean,
    "heat": World._heat,
    "cool": World._cool,
    "slice": World._slice,
}
