"""A search expert, which uses only what the agent has seen.

It has no internal plan. Its next command is a function of the seen part of the world, so that it continues
correctly from every state, even after the commands of another policy.
"""

from __future__ import annotations

from empg_envs.household.goals import HouseholdGoal
from empg_envs.household.moves import here_first, put_away, put_into, reach, use_tool
from empg_envs.household.tables import EXAMINE, KIND_OF, LAMP, LAMP_PLACES, PICK_TWO, PLACES
from empg_envs.household.world import World


def choose_command(world: World, goal: HouseholdGoal) -> str:
    """Return the next command of the search expert.

    It searches receptacles in the order of their probability to contain a missing object. It then takes the
    object, brings it into the wanted state, and puts it into the target.

    Args:
      world: the state; the contents of receptacles outside ``world.seen`` are not used.
      goal: the goal, which is not met yet.

    Returns:
      An admissible command.
    """
    holding = world.holding
    if holding is None:
        return _fetch(world, goal)
    if world.scene.class_of[holding] != goal.thing:
        return put_away(world, holding)
    if goal.family == EXAMINE:
        return _bring_to_lamp(world, goal)
    if not goal.is_ready(world, holding):
        return use_tool(world, goal.family, holding)
    return put_into(world, holding, _target(world, goal))


def _fetch(world: World, goal: HouseholdGoal) -> str:
    settled = _target(world, goal) if goal.family == PICK_TWO else None
    for receptacle in here_first(world, world.seen):
        if receptacle == settled:
            continue
        for thing in world.contents[receptacle]:
            if world.scene.class_of[thing] == goal.thing and thing in world.scene.pickupable:
                return reach(world, receptacle) or f"take {thing} from {receptacle}"
    return _search(world, PLACES.get(KIND_OF.get(goal.thing, ""), {}))


def _bring_to_lamp(world: World, goal: HouseholdGoal) -> str:
    for receptacle in here_first(world, world.seen):
        for thing in world.contents[receptacle]:
            if world.scene.class_of[thing] == goal.target:
                return f"use {thing}" if receptacle in world.here else f"go to {receptacle}"
    return _search(world, LAMP_PLACES if goal.target == LAMP else {})


def _search(world: World, places: dict[str, int]) -> str:
    """Go to, open or examine the likeliest receptacle whose contents are not known yet."""
    class_of, here = world.scene.class_of, world.here
    unseen = [name for name in world.scene.location_of if name not in world.seen]
    if not unseen:
        raise RuntimeError(
            "the search expert has seen everything and still misses something: the game is unsolvable"
        )
    # A plausible receptacle at the agent's location comes first; ties keep the order of the house.
    likeliest = sorted(
        unseen, key=lambda r: (not (r in here and class_of[r] in places), -places.get(class_of[r], 0))
    )
    return reach(world, likeliest[0]) or f"examine {likeliest[0]}"


def _target(world: World, goal: HouseholdGoal) -> str:
    """Return the receptacle of the target class that already contains the most wanted objects."""
    class_of = world.scene.class_of

    def count(receptacle: str) -> int:
        return sum(class_of[thing] == goal.thing for thing in world.contents[receptacle])

    candidates = [
        name for name in here_first(world, world.scene.location_of) if class_of[name] == goal.target
    ]
    return max(candidates, key=lambda name: count(name) if name in world.seen else 0)
