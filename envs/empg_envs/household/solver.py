"""An expert with full information, which wins every winnable game.

Like the search expert it has no internal plan. Its next command is a function of world and goal, so that it
continues correctly from every state.
"""

from __future__ import annotations

from empg_envs.household.goals import HouseholdGoal
from empg_envs.household.moves import put_away, put_into, reach, use_tool
from empg_envs.household.tables import EXAMINE, PICK_TWO
from empg_envs.household.world import CHANGES, World


def choose_command(world: World, goal: HouseholdGoal) -> str:
    """Return the next command on a short way to the goal.

    Args:
      world: the state, including unseen contents.
      goal: the goal, which is not met yet.

    Returns:
      An admissible command.

    Raises:
      RuntimeError: the game cannot be won (any more).
    """
    holding = world.holding
    if holding is None:
        return _fetch(world, goal)
    if not _is_wanted(world, goal, holding):
        return put_away(world, holding)
    if goal.family == EXAMINE:
        return _light(world, goal)
    if not goal.is_ready(world, holding):
        return use_tool(world, goal.family, holding)
    return put_into(world, holding, _choose_target(world, goal, holding))


def _is_wanted(world: World, goal: HouseholdGoal, thing: str) -> bool:
    """Return whether an object can be brought into the state that the goal asks for."""
    scene = world.scene
    is_fit = goal.family not in CHANGES or thing in getattr(scene, CHANGES[goal.family])
    return is_fit and scene.class_of[thing] == goal.thing and thing in scene.pickupable


def _fetch(world: World, goal: HouseholdGoal) -> str:
    """Return the next command to fetch the wanted object that needs the fewest further commands."""
    settled = _choose_target(world, goal, None) if goal.family == PICK_TWO else None
    best: tuple[int, str, str] | None = None
    for receptacle, things in world.contents.items():
        if receptacle == settled:
            continue
        for thing in things:
            if _is_wanted(world, goal, thing):
                cost = _distance(world, receptacle) + 2 * (not goal.is_ready(world, thing))
                if best is None or cost < best[0]:
                    best = cost, thing, receptacle
    if best is None:
        raise RuntimeError(f"the game cannot be won: no {goal.thing} is left to take")
    _, thing, receptacle = best
    return reach(world, receptacle) or f"take {thing} from {receptacle}"


def _light(world: World, goal: HouseholdGoal) -> str:
    """Return the next command to carry the object to a lamp and to turn the lamp on."""
    lamps = [
        (_distance(world, receptacle) - (thing in world.toggled), receptacle, thing)
        for receptacle, things in world.contents.items()
        for thing in things
        if thing in world.scene.toggleable and world.scene.class_of[thing] == goal.target
    ]
    if not lamps:
        raise RuntimeError(f"the game cannot be won: there is no {goal.target}")
    _, receptacle, lamp = min(lamps)
    return f"use {lamp}" if receptacle in world.here else f"go to {receptacle}"


def _choose_target(world: World, goal: HouseholdGoal, holding: str | None) -> str:
    """Return the nearest target receptacle; with two wanted objects, first the one that contains more."""
    class_of = world.scene.class_of
    candidates = [
        name
        for name in world.contents
        if class_of[name] == goal.target and (holding is None or world.is_fitting(holding, name))
    ]
    if not candidates:
        raise RuntimeError(f"the game cannot be won: no {goal.target} takes a {goal.thing}")

    def rank(receptacle: str) -> tuple[int, int]:
        held = sum(class_of[thing] == goal.thing for thing in world.contents[receptacle])
        return -held if goal.family == PICK_TWO else 0, _distance(world, receptacle)

    return min(candidates, key=rank)


def _distance(world: World, receptacle: str) -> int:
    """Return the number of commands until the agent can reach into a receptacle."""
    return (receptacle not in world.here) + (not world.is_accessible(receptacle))
