"""Small steps that experts share: toward a receptacle, into it, and getting rid of what is carried."""

from __future__ import annotations

from collections.abc import Iterable

from empg_envs.household.world import World


def reach(world: World, receptacle: str) -> str | None:
    """Return the command that brings the hands closer to a receptacle; None when they are in it."""
    if receptacle not in world.here:
        return f"go to {receptacle}"
    return None if world.is_accessible(receptacle) else f"open {receptacle}"


def put_into(world: World, thing: str, receptacle: str) -> str:
    """Return the next command on the way of a carried object into a receptacle."""
    return reach(world, receptacle) or f"move {thing} to {receptacle}"


def put_away(world: World, holding: str) -> str:
    """Return the next command on the way of a carried object into the first receptacle that may hold it.

    Some official games hold things that, once taken, fit nowhere (a roll of paper towels); the episode is
    then lost, and looking around is as good as anything.
    """
    for receptacle in [*world.here, *world.scene.location_of]:
        if world.is_fitting(holding, receptacle):
            return put_into(world, holding, receptacle)
    return "look"


def use_tool(world: World, verb: str, thing: str) -> str:
    """Return the next command on the way of cleaning, heating or cooling a carried object."""
    class_of, tools = world.scene.class_of, world.scene.tools[verb]
    receptacles = here_first(world, world.scene.location_of)
    tool = next(name for name in receptacles if class_of[name] in tools)
    return f"{verb} {thing} with {tool}" if tool in world.here else f"go to {tool}"


def here_first(world: World, receptacles: Iterable[str]) -> list[str]:
    """Return receptacles in the order of the house, those at the agent's location first."""
    wanted = set(receptacles)
    return sorted(
        (name for name in world.scene.location_of if name in wanted), key=lambda name: name not in world.here
    )
