"""Panels of generated tasks: train, valid and test, disjoint by content.

The map from index to task has these properties by construction:

* *Hardly a duplicate in a panel.* A house of a level has ``num_classes`` different object classes out of
  the level's pool. An affine permutation maps the index to the rank of that set among all such sets. Two
  indices of one panel have the same classes only if they are a multiple of the number of sets apart. No panel
  of the household is that long, but those of two rooms of ALFWorld are (bathroom: 1,716 sets, kitchen:
  43,758); there only the draws of receptacles, places and goal keep the contents apart.
* *Disjoint panels.* The canonical content of a game (rooms, receptacles, places of the object classes, and
  the goal, without instance numbers and wording) is hashed. Only the hash decides the split. Attempts 0, 1,
  2, ... of an index are drawn until one belongs to the wanted split.
* *Cheap and lazy.* A task needs about 1.25 attempts for train and 10 for valid and test, for every index.
  Nothing is precomputed.

The only random function is `random.Random(int).random()`, because Python guarantees its results for all
versions.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import operator
from collections.abc import Sequence

from empg_envs.draw import Draw
from empg_envs.household.goals import NUM_WORDINGS, HouseholdGoal
from empg_envs.household.tables import (
    CHANGEABLE,
    CLEANABLE,
    COOLABLE,
    EXAMINE,
    HEATABLE,
    KIND_OF,
    KNIVES,
    LAMP,
    LAMP_PLACES,
    LEVELS,
    MAX_INSTANCES,
    OPENABLE,
    PICK_TWO,
    PLACES,
    SLICEABLE,
    VESSELS,
    Level,
    can_contain,
)
from empg_envs.household.world import TOOLS, Scene

SPLITS = ("train", "valid", "test")
_TASKS = {"valid": 256, "test": 512}
_SHARES = {"train": (0.0, 0.8), "valid": (0.8, 0.9), "test": (0.9, 1.0)}
_MAX_ATTEMPTS = 10_000


@dataclasses.dataclass(frozen=True, slots=True)
class Game:
    """One task: the house, the goal, and the wording of the task sentence."""

    scene: Scene
    goal: HouseholdGoal
    wording: int
    content_hash: str

    @property
    def task(self) -> str:
        """The task sentence."""
        return self.goal.sentence(self.wording)


def num_tasks(level: Level, split: str) -> int:
    """Return the size of a panel.

    Raises:
      ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(
            f"unknown split {split!r} of level {level.name!r}; the splits are {', '.join(SPLITS)}"
        )
    return _TASKS.get(split, level.train_tasks)


def split_of(content_hash: str) -> str:
    """Return the split of a content; it is the same in every level."""
    share = int(content_hash[:8], 16) / 2**32
    return next(split for split, (low, high) in _SHARES.items() if low <= share < high)


def make_game(level: Level, split: str, index: int) -> Game:
    """Generate task ``index`` of a panel.

    Raises:
      ValueError: unknown split.
      IndexError: index outside the panel.
      TypeError: index is not an integer.
    """
    count = num_tasks(level, split)
    index = operator.index(index)
    if not 0 <= index < count:
        raise IndexError(f"task index {index} of split {split!r} is outside [0, {count})")
    classes = _classes_of(level, split, index)
    for attempt in range(_MAX_ATTEMPTS):
        draw = Draw("household", level.name, split, index, attempt)
        game = _attempt(level, classes, draw)
        if game is not None and split_of(game.content_hash) == split:
            return game
    raise AssertionError(f"level {level.name!r} has no content for {split} task {index}")


@functools.lru_cache(maxsize=64)
def panel_hash(level_name: str, split: str) -> str:
    """Return the hash of the ordered content hashes of a panel: the panel's identity."""
    level = LEVELS[level_name]
    digest = hashlib.sha256()
    for index in range(num_tasks(level, split)):
        digest.update(make_game(level, split, index).content_hash.encode())
    return digest.hexdigest()


def _classes_of(level: Level, split: str, index: int) -> list[str]:
    """Return the object classes of a task: a different set for every index of the panel."""
    total = math.comb(len(level.objects), level.num_classes)
    step, offset = _affine(level.name, split, total)
    return unrank(level.objects, level.num_classes, (step * index + offset) % total)


@functools.lru_cache(maxsize=64)
def _affine(level_name: str, split: str, total: int) -> tuple[int, int]:
    draw = Draw("household", level_name, split, "permutation")
    step = 1 + draw.below(total - 1)
    # A step without a common divisor with ``total`` makes index -> rank a permutation.
    while math.gcd(step, total) != 1:
        step += 1
    return step, draw.below(total)


def unrank(items: Sequence[str], count: int, rank: int) -> list[str]:
    """Return the set with index ``rank`` among all sets of ``count`` items in lexicographic order."""
    chosen: list[str] = []
    for position, item in enumerate(items):
        if len(chosen) == count:
            break
        # Number of sets that contain ``item`` and the items chosen so far; they precede all others.
        with_item = math.comb(len(items) - position - 1, count - len(chosen) - 1)
        if rank < with_item:
            chosen.append(item)
        else:
            rank -= with_item
    return chosen


def _attempt(level: Level, classes: list[str], draw: Draw) -> Game | None:
    """Return one random house with these object classes, or None if the house allows no task."""
    rooms, class_of = _furnish(level, draw)
    receptacles = [name for names in rooms.values() for name in names]
    things = _place(level, classes, receptacles, class_of, draw)
    goal = _choose_goal(level, things, class_of, draw)
    if goal is None:
        return None
    wording = draw.below(NUM_WORDINGS)
    content_hash = _hash_content(rooms, things, class_of, goal)
    return Game(_make_scene(rooms, things, class_of), goal, wording, content_hash)


def _furnish(level: Level, draw: Draw) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Return the rooms with their receptacles, and the receptacles' classes.

    The numbers of a class run through the whole house.
    """
    rooms: dict[str, tuple[str, ...]] = {}
    class_of: dict[str, str] = {}
    used: dict[str, int] = {}
    for room in level.rooms:
        names = []
        for cls in sorted((*room.always, *draw.sample(room.sometimes, draw.between(room.some)))):
            used[cls] = used.get(cls, 0) + 1
            names.append(f"{cls} {used[cls]}")
            class_of[names[-1]] = cls
        rooms[room.name] = tuple(names)
    return rooms, class_of


def _place(
    level: Level, classes: list[str], receptacles: list[str], class_of: dict[str, str], draw: Draw
) -> dict[str, str]:
    """Draw a receptacle for every object; the objects' classes are added to ``class_of``."""
    # Each class occurs MAX_INSTANCES - 1 times in the pool, so that no class gets more instances.
    copies = draw.sample(classes * (MAX_INSTANCES - 1), draw.between(level.copies))
    where: dict[str, str] = {}
    used: dict[str, int] = {}
    for cls in [*classes, *copies, LAMP]:
        places = LAMP_PLACES if cls == LAMP else PLACES[KIND_OF[cls]]
        options = [name for name in receptacles if class_of[name] in places]
        if cls == LAMP and not options:
            continue
        used[cls] = used.get(cls, 0) + 1
        name = f"{cls} {used[cls]}"
        where[name] = draw.weighted(options, [places[class_of[option]] for option in options])
    class_of.update((name, name.split()[0]) for name in where)
    return where


def _choose_goal(
    level: Level, things: dict[str, str], class_of: dict[str, str], draw: Draw
) -> HouseholdGoal | None:
    """Draw a goal of a random family that is not met at the start."""
    families, weights = zip(*level.families, strict=True)
    family = draw.weighted(families, weights)
    counts: dict[str, int] = {}
    for thing in things:
        counts[class_of[thing]] = counts.get(class_of[thing], 0) + 1
    counts.pop(LAMP, None)
    wanted = [
        cls
        for cls, count in counts.items()
        if (family != PICK_TWO or count >= 2) and (family not in CHANGEABLE or cls in CHANGEABLE[family])
    ]
    if not wanted:
        return None
    cls = wanted[draw.below(len(wanted))]
    if family == EXAMINE:
        return HouseholdGoal(family, cls, LAMP)
    # A class that already contains a wanted object is no target, because the goal could be met at the start.
    # The tools of the family are excluded, too.
    taken = {class_of[place] for thing, place in things.items() if class_of[thing] == cls}
    taken |= TOOLS.get(family, frozenset())
    receptacle_classes = sorted({class_of[name] for name in class_of if name not in things})
    targets = [target for target in receptacle_classes if target not in taken and can_contain(target, cls)]
    return HouseholdGoal(family, cls, targets[draw.below(len(targets))]) if targets else None


def _hash_content(
    rooms: dict[str, tuple[str, ...]], things: dict[str, str], class_of: dict[str, str], goal: HouseholdGoal
) -> str:
    """Return the hash of the initial state and the goal, without numbers, names or order."""
    # Sorted classes instead of names: houses that differ only in numbering must have the same hash.
    inside: dict[str, list[str]] = {name: [] for names in rooms.values() for name in names}
    for thing, place in things.items():
        inside[place].append(class_of[thing])
    house = {
        room: sorted([class_of[name], sorted(inside[name])] for name in names)
        for room, names in rooms.items()
    }
    content = {"house": house, "goal": [goal.family, goal.thing, goal.target]}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _make_scene(rooms: dict[str, tuple[str, ...]], things: dict[str, str], class_of: dict[str, str]) -> Scene:
    receptacles = [name for names in rooms.values() for name in names]
    # Listings are sorted by class with the highest number first, as in ALFWorld.
    listed = sorted(things, key=lambda name: (class_of[name], -int(name.split()[1])))
    start: dict[str, list[str]] = {name: [] for name in receptacles}
    for thing in listed:
        start[things[thing]].append(thing)
    receptacle_classes = sorted({class_of[name] for name in receptacles})
    thing_classes = sorted({class_of[name] for name in things})

    def having(classes: frozenset[str]) -> frozenset[str]:
        return frozenset(name for name in things if class_of[name] in classes)

    return Scene(
        rooms=rooms,
        class_of=class_of,
        order={name: position for position, name in enumerate(listed)},
        location_of={name: name for name in receptacles},
        at_location={name: (name,) for name in receptacles},
        openable=frozenset(name for name in receptacles if class_of[name] in OPENABLE),
        start={name: tuple(inside) for name, inside in start.items()},
        fits=frozenset((r, t) for r in receptacle_classes for t in thing_classes if can_contain(r, t)),
        pickupable=frozenset(name for name in things if class_of[name] != LAMP),
        toggleable=having(frozenset({LAMP})),
        cleanable=having(CLEANABLE),
        heatable=having(HEATABLE),
        coolable=having(COOLABLE),
        sliceable=having(SLICEABLE),
        knives=having(KNIVES),
        vessels=having(VESSELS),
    )
