"""Export of generated games in the format of the official ``game.tw-pddl`` files."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from empg_envs.alfworld.formal import DOMAIN_OTYPES, DOMAIN_RTYPES, make_domain, make_grammar
from empg_envs.alfworld.goal import FORMULAS
from empg_envs.household import tasks
from empg_envs.household.texts import HELP
from empg_envs.household.world import Scene

_START = "loc_bar_0_bar_0_bar_0_bar_30"
TASK_TYPES = {
    "pick": "pick_and_place_simple",
    "examine": "look_at_obj_in_light",
    "clean": "pick_clean_then_place_in_recep",
    "heat": "pick_heat_then_place_in_recep",
    "cool": "pick_cool_then_place_in_recep",
    "pick_two": "pick_two_obj_and_place",
}


def make_content(game: tasks.Game) -> dict[str, Any]:
    """Return the JSON content of a game's file, for `empg_envs.alfworld.game.parse_game` and TextWorld."""
    return {
        "pddl_domain": make_domain(),
        "grammar": make_grammar(game.task, HELP),
        "pddl_problem": make_problem(game),
        "solvable": True,
    }


def write_game(game: tasks.Game, root: Path, split: str, name: str) -> Path:
    """Write ``root/split/<task type>-<object>-None-<receptacle or lamp>-generated/<name>/game.tw-pddl``.

    That is ALFWorld's order; ``None`` stands for the movable receptacle, which these tasks have not.

    Returns:
      The file. It is written atomically.
    """
    goal = game.goal
    thing, target = goal.thing.capitalize(), goal.target.capitalize()
    task = f"{TASK_TYPES[goal.family]}-{thing}-None-{target}-generated"
    path = root / split / task / name / "game.tw-pddl"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(make_content(game)))
    os.replace(temporary, path)
    return path


def make_problem(game: tasks.Game) -> str:
    """Return the problem in PDDL, with identifiers that keep the game's display names."""
    scene = game.scene
    names = _identify(scene)
    places = {name: f"loc_bar_{n}_bar_0_bar_0_bar_60" for n, name in enumerate(scene.location_of, start=1)}
    things = list(scene.order)
    otypes = sorted({_type(scene, name) for name in things} | set(DOMAIN_OTYPES))
    rtypes = sorted({_type(scene, name) for name in places} | set(DOMAIN_RTYPES))
    declared = [
        ("agent1", "agent"),
        *((name, "otype") for name in otypes),
        *((name, "rtype") for name in rtypes),
        *((names[name], "object") for name in things),
        *((names[name], "receptacle") for name in places),
        *((place, "location") for place in (_START, *places.values())),
    ]
    formula = FORMULAS[game.goal.family].format(
        thing=_type_of(game.goal.thing), target=_type_of(game.goal.target)
    )
    objects = "\n".join(f"  {name} - {kind}" for name, kind in declared)
    facts = "\n".join(f"  ({' '.join(fact)})" for fact in _facts(scene, names, places))
    return (
        f"(define (problem generated_{game.content_hash[:16]})\n(:domain alfred)\n(:objects\n{objects}\n)\n"
        f"(:init\n{facts}\n)\n(:goal (and {formula}))\n)\n"
    )


def _facts(scene: Scene, names: dict[str, str], places: dict[str, str]) -> Iterable[tuple[str, ...]]:
    yield "atLocation", "agent1", _START
    for receptacle, place in places.items():
        yield "receptacleType", names[receptacle], _type(scene, receptacle)
        yield "receptacleAtLocation", names[receptacle], place
        if receptacle in scene.openable:
            yield "openable", names[receptacle]
        for thing in scene.start[receptacle]:
            yield "inReceptacle", names[thing], names[receptacle]
            yield "objectAtLocation", names[thing], place
    for thing in scene.order:
        yield "objectType", names[thing], _type(scene, thing)
    for rtype, otype in sorted(scene.fits):
        yield "canContain", _type_of(rtype), _type_of(otype)
    abilities = {
        "pickupable": scene.pickupable,
        "toggleable": scene.toggleable,
        "cleanable": scene.cleanable,
        "heatable": scene.heatable,
        "coolable": scene.coolable,
        "sliceable": scene.sliceable,
        "isReceptacleObject": scene.vessels,
    }
    for predicate, able in abilities.items():
        for thing in sorted(able):
            yield predicate, names[thing]


def _identify(scene: Scene) -> dict[str, str]:
    """Map display names to identifiers from which ALFWorld's numbering gives the same display names."""
    counts = collections.Counter(scene.class_of[name] for name in scene.class_of)
    identifiers = {}
    for name, cls in scene.class_of.items():
        # ALFWorld assigns numbers from the end: the highest number belongs to the first identifier.
        rank = counts[cls] - int(name.rpartition(" ")[2])
        stem = cls.removesuffix("basin")
        part = f"_bar_{cls.capitalize()}" if stem != cls else ""
        identifiers[name] = (
            f"{stem.capitalize()}_bar__plus_00_dot_{rank:02d}_bar__plus_00_dot_90_bar__plus_00_dot_00{part}"
        )
    return identifiers


def _type(scene: Scene, name: str) -> str:
    return _type_of(scene.class_of[name])


def _type_of(cls: str) -> str:
    return f"{cls.capitalize()}Type"
