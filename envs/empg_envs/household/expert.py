"""A search expert: it acts only on what the agent has been shown.

It keeps no plan. Its next command is a function of the world as far as it has been seen, so it goes
on correctly from any state, whoever brought it there.
"""

from __future__ import annotations

from empg_envs.household.goals import HouseholdGoal
from empg_envs.household.moves import here_first, put_away, put_into, reach, use_tool
from empg_envs.household.tables import EXAMINE, KIND_OF, LAMP, LAMP_PLACES, PICK_TWO, PLACES
from empg_envs.household.world import World


def choose_command(world: World, goal: HouseholdGoal) -> str:
    """Return the next command of the search expert.

    It looks through receptacles in the order of how likely they hold what is missing, picks it up,
    brings it into the wanted state, and takes it where it belongs.

    Args:
      world: the state; receptacles outside ``world.seen`` are treated as unknown.
      goal: what is wanted, not met yet.

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
    """Go to, or opens, the likeliest receptacle that has not been seen into."""
    class_of, here = world.scene.class_of, world.here
    unseen = [name for name in world.scene.location_of if name not in world.seen]
    if not unseen:
        raise RuntimeError(
            "the search expert has seen everything and still misses something: the game is unsolvable"
        )
    # A plausible closed door right here is opened first; equals keep the order of the house.
    likeliest = sorted(
        unseen, key=lambda r: (not (r in here and class_of[r] in places), -places.get(class_of[r], 0))
    )
    return reach(world, likeliest[0]) or f"examine {likeliest[0]}"


def _target(world: World, goal: HouseholdGoal) -> str:
    """Return the receptacle to fill: of the target class, the one that holds most of what is wanted."""
    class_of = world.scene.class_of

    def count(receptacle: str) -> int:
        return sum(class_of[thing] == goal.thing for thing in world.contents[receptacle])

    candidates = [
        name for name in here_first(world, world.scene.location_of) if class_of[name] == goal.target
    ]
    return max(candidates, key=lambda name: count(name) if name in world.seen else 0)
