"""The six task families: their conditions and their task sentences."""

from __future__ import annotations

import dataclasses

from empg_envs.household.tables import CLEAN, COOL, EXAMINE, HEAT, PICK, PICK_TWO
from empg_envs.household.world import World

# Two wordings of each goal, as in ALFWorld's data.
_SENTENCES = {
    PICK: ("put a {thing} in {target}.", "put some {thing} on {target}."),
    EXAMINE: ("examine the {thing} with the {target}.", "look at {thing} under the {target}."),
    CLEAN: ("put a clean {thing} in {target}.", "clean some {thing} and put it in {target}."),
    HEAT: ("put a hot {thing} in {target}.", "heat some {thing} and put it in {target}."),
    COOL: ("put a cool {thing} in {target}.", "cool some {thing} and put it in {target}."),
    PICK_TWO: ("put two {thing} in {target}.", "find two {thing} and put them in {target}."),
}
NUM_WORDINGS = 2

_TERSE = {
    PICK: "put {thing} in {target}",
    EXAMINE: "examine {thing} with {target}",
    CLEAN: "put clean {thing} in {target}",
    HEAT: "put hot {thing} in {target}",
    COOL: "put cool {thing} in {target}",
    PICK_TWO: "put two {thing} in {target}",
}


@dataclasses.dataclass(frozen=True, slots=True)
class HouseholdGoal:
    """A goal over classes, which any instances of the classes can meet.

    Attributes:
      family: one of the six task families.
      thing: class of the wanted object.
      target: class of the receptacle to put it in; for ``examine`` the class of the lamp.
    """

    family: str
    thing: str
    target: str

    def is_met(self, world: World) -> bool:
        """Return whether the world meets the goal."""
        if self.family == EXAMINE:
            return self._is_lit(world)
        needed = 2 if self.family == PICK_TWO else 1
        return self._most_placed(world) >= needed

    def milestones(self, world: World) -> frozenset[str]:
        """Name the subgoals that hold now: ``held``, ``ready`` (clean, hot, cool), ``placed``, ``met``.

        ``held`` is an object of the wanted class in hand; ``placed`` is one of two at the target.
        """
        class_of = world.scene.class_of
        held = world.holding is not None and class_of[world.holding] == self.thing
        things = (*(thing for inside in world.contents.values() for thing in inside), world.holding)
        changed = self.family in (CLEAN, HEAT, COOL) and any(
            thing is not None and class_of[thing] == self.thing and self.is_ready(world, thing)
            for thing in things
        )
        placed = self.family == PICK_TWO and self._most_placed(world) > 0
        found = {"held": held, "ready": changed, "placed": placed, "met": self.is_met(world)}
        return frozenset(name for name, holds in found.items() if holds)

    def _most_placed(self, world: World) -> int:
        """Count the wanted objects in the receptacle of the target's class that has most of them."""
        class_of = world.scene.class_of
        counts = (
            sum(class_of[thing] == self.thing and self.is_ready(world, thing) for thing in things)
            for receptacle, things in world.contents.items()
            if class_of[receptacle] == self.target
        )
        return max(counts, default=0)

    def is_ready(self, world: World, thing: str) -> bool:
        """Return whether an object is in the wanted state (clean, hot, cool)."""
        scene = world.scene
        if self.family == CLEAN:
            return thing in world.clean and thing in scene.cleanable
        if self.family == HEAT:
            return thing in world.hot and thing in scene.heatable
        if self.family == COOL:
            return thing in world.cool and thing in scene.coolable
        return True

    def _is_lit(self, world: World) -> bool:
        class_of = world.scene.class_of
        if world.holding is None or class_of[world.holding] != self.thing:
            return False
        return any(
            class_of[lamp] == self.target and lamp in world.contents[receptacle]
            for lamp in world.toggled
            for receptacle in world.here
        )

    def sentence(self, wording: int) -> str:
        """Return the task sentence in one of ALFWorld's wordings."""
        return _SENTENCES[self.family][wording].format(thing=self.thing, target=self.target)

    def terse(self, thing: str, target: str) -> str:
        """Return the goal in few words, with these names of the object and the target."""
        return _TERSE[self.family].format(thing=thing, target=target)
