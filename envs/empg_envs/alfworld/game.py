"""Parsing of ``game.tw-pddl`` files into playable games."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from empg_envs.alfworld.goal import class_name, recognize
from empg_envs.alfworld.problem import GameFileError, Problem, parse_problem
from empg_envs.household.goals import HouseholdGoal
from empg_envs.household.tables import EXAMINE, PICK_TWO
from empg_envs.household.world import CHANGES, Scene

KEYS = ("pddl_problem", "grammar", "solvable")
NO_TASK = "UNKNOWN GOAL"  # the placeholder in a grammar without a task sentence
TASK = re.compile(r"Your task is to: ([^\"\\]*)")
# PDDL predicate of the initial state -> name of the state in `World`.
_STATES = {
    "opened": "opened",
    "isclean": "clean",
    "ishot": "hot",
    "iscool": "cool",
    "istoggled": "toggled",
    "issliced": "sliced",
}
_KNIVES = ("knifetype", "butterknifetype")


@dataclasses.dataclass(frozen=True, slots=True)
class Game:
    """One game: the room, the goal, the task sentence, and the hash of its content."""

    scene: Scene
    goal: HouseholdGoal
    task: str
    content_hash: str


def read_game(path: Path) -> dict[str, Any]:
    """Read the content of a game file.

    Raises:
      GameFileError: the file cannot be read, is no JSON object, or lacks a key.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise GameFileError(f"not a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise GameFileError(f"holds a JSON {type(content).__name__}; expected an object")
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise GameFileError(f"lacks the key {missing[0]!r}")
    if not isinstance(content["pddl_problem"], str) or not isinstance(content["grammar"], str):
        raise GameFileError("pddl_problem and grammar must be text")
    return content


def load_game(path: Path) -> Game:
    """Load the game of a file, without a check of its ``solvable`` flag.

    Raises:
      GameFileError: the game cannot be played.
    """
    return parse_game(read_game(path))


def parse_game(content: Mapping[str, Any]) -> Game:
    """Build a game from the content of its file.

    Raises:
      GameFileError: the content is malformed, or refers to objects that do not exist.
    """
    problem = parse_problem(content["pddl_problem"])
    task = TASK.search(content["grammar"])
    if task is None or NO_TASK in task.group(1):
        raise GameFileError("grammar: no task sentence ('Your task is to: …')")
    goal = recognize(problem)
    scene = make_scene(problem)
    _check(scene, goal)
    text = "\n".join((task.group(1), " ".join(content["pddl_problem"].lower().split())))
    return Game(scene, goal, task.group(1), hashlib.sha256(text.encode()).hexdigest())


def name_entities(identifiers: Iterable[str]) -> dict[str, str]:
    """Map identifiers to display names, by ALFWorld's rule.

    The class is the text before the first ``_bar_``, followed by ``basin`` if the identifier contains it. The
    numbers of a class are assigned from the end, so that the first identifier has the highest number.
    """
    ordered = sorted(identifiers)
    classes = {name: name.split("_bar_", 1)[0] + "basin" * ("basin" in name) for name in ordered}
    left = collections.Counter(classes.values())
    names = {}
    for identifier in ordered:
        cls = classes[identifier]
        names[identifier] = f"{cls} {left[cls]}"
        left[cls] -= 1
    return names


def make_scene(problem: Problem) -> Scene:
    """Build the room of a problem, with display names for everything in it.

    Raises:
      GameFileError: facts have the wrong number of arguments, or refer to objects without place or type.
    """
    try:
        return _make_scene(problem.facts)
    except GameFileError:
        raise
    except ValueError as error:
        raise GameFileError(f"a fact of :init has the wrong number of arguments: {error}") from error
    except KeyError as error:
        raise GameFileError(f":init gives no place or no type of {error}") from error


def _make_scene(facts: Mapping[str, list[tuple[str, ...]]]) -> Scene:
    found = {name for rows in facts.values() for row in rows for name in row if "_bar_" in name}
    names = name_entities(found)
    rows = collections.defaultdict(list, facts)
    located = {receptacle: place for receptacle, place in rows["receptacleatlocation"]}
    receptacles = sorted(located)
    kinds = {name: kind for name, kind in (*rows["receptacletype"], *rows["objecttype"])}
    things = sorted({o for o, _ in rows["objecttype"]} | {o for o, _ in rows["inreceptacle"]})
    holders: dict[str, list[str]] = {receptacle: [] for receptacle in receptacles}
    for thing, receptacle in sorted(rows["inreceptacle"]):
        holders[receptacle].append(names[thing])
    inside: dict[str, list[str]] = collections.defaultdict(list)
    for thing, vessel in sorted(rows["inreceptacleobject"]):
        inside[names[vessel]].append(names[thing])
    here: dict[str, list[str]] = collections.defaultdict(list)
    for receptacle in receptacles:
        here[names[located[receptacle]]].append(names[receptacle])
    ((_, start_at),) = rows["atlocation"]
    if rows["holds"] or rows["holdsany"]:
        raise GameFileError("it begins with something in hand, which is not supported")

    def having(predicate: str) -> frozenset[str]:
        return frozenset(names[name] for (name,) in rows[predicate])

    return Scene(
        rooms={"room": tuple(names[r] for r in receptacles)},
        class_of={names[name]: class_name(kinds[name]) for name in (*receptacles, *things)},
        order={names[thing]: position for position, thing in enumerate(things)},
        location_of={names[r]: names[located[r]] for r in receptacles},
        at_location={place: tuple(at) for place, at in here.items()},
        openable=having("openable"),
        start={names[r]: tuple(holders[r]) for r in receptacles},
        fits=frozenset((class_name(r), class_name(o)) for r, o in rows["cancontain"]),
        pickupable=having("pickupable"),
        toggleable=having("toggleable"),
        cleanable=having("cleanable"),
        heatable=having("heatable"),
        coolable=having("coolable"),
        sliceable=having("sliceable"),
        knives=frozenset(names[o] for o, kind in rows["objecttype"] if kind in _KNIVES),
        vessels=having("isreceptacleobject"),
        start_at=names[start_at],
        spots=frozenset((names[o], names[place]) for o, place in rows["objectatlocation"]),
        initial={state: having(fact) for fact, state in _STATES.items() if rows[fact]},
        inside={vessel: tuple(lying) for vessel, lying in inside.items()},
    )


def _check(scene: Scene, goal: HouseholdGoal) -> None:
    """Refuse a game that cannot be won because the objects or receptacles for its goal do not exist."""
    contained = {thing for things in scene.start.values() for thing in things}
    wanted = {thing for thing in contained & scene.pickupable if scene.class_of[thing] == goal.thing}
    if goal.family in CHANGES:
        wanted &= getattr(scene, CHANGES[goal.family])
    needed = 2 if goal.family == PICK_TWO else 1
    if len(wanted) < needed:
        raise GameFileError(f"needs {needed} fit {goal.thing}, has {len(wanted)}", "unsolvable")
    if goal.family == EXAMINE:
        if not any(scene.class_of[lamp] == goal.target for lamp in contained & scene.toggleable):
            raise GameFileError(f"no {goal.target} to turn on", "unsolvable")
        return
    classes = {scene.class_of[receptacle] for receptacle in scene.start}
    if goal.target not in classes:
        raise GameFileError(f"there is no {goal.target}", "unsolvable")
    if (goal.target, goal.thing) not in scene.fits:
        raise GameFileError(f"no {goal.thing} can be put into a {goal.target}", "unsolvable")
    if goal.family in CHANGES and not classes & scene.tools[goal.family]:
        raise GameFileError(f"nothing to {goal.family} it with", "unsolvable")
