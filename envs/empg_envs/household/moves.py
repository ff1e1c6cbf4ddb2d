"""Elementary moves of the experts: reach a receptacle, put an object into it, use a tool."""

from __future__ import annotations

from collections.abc import Iterable

from empg_envs.household.world import World


def reach(world: World, receptacle: str) -> str | None:
    """Return the next command to reach into a receptacle, or None if the agent can reach into it now."""
    if receptacle not in world.here:
        return f"go to {receptacle}"
    return None if world.is_accessible(receptacle) else f"open {receptacle}"


def put_into(world: World, thing: str, receptacle: str) -> str:
    """Return the next command to put a carried object into a receptacle."""
    return reach(world, receptacle) or f"move {thing} to {receptacle}"


def put_away(world: World, holding: str) -> str:
    """Return the next command to put a carried object into the first receptacle that accepts it.

    Some official games contain objects that, once taken, fit into no receptacle (a roll of paper towels). The
    episode can then not be won, and the command is ``look``.
    """
    for receptacle in [*world.here, *world.scene.location_of]:
        if world.is_fitting(holding, receptacle):
            return put_into(world, holding, receptacle)
    return "look"


def use_tool(world: World, verb: str, thing: str) -> str:
    """Return the next command to clean, heat or cool a carried object."""
    class_of, tools = world.scene.class_of, world.scene.tools[verb]
    receptacles = here_first(world, world.scene.location_of)
    tool = next(name for name in receptacles if class_of[name] in tools)
    return f"{verb} {thing} with {tool}" if tool in world.here else f"go to {tool}"


def here_first(world: World, receptacles: Iterable[str]) -> list[str]:
    """Return the receptacles in the order of the house, but those at the agent's location first."""
    wanted = set(receptacles)
    return sorted(
        (name for name in world.scene.location_of if name in wanted), key=lambda name: name not in world.here
    )
