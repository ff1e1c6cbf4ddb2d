"""Tables of households: rooms, receptacles, objects, and the levels built from them.

Class names are ALFWorld's (one lower-case word). The name of an instance is a class and a number:
``apple 1``. A *kind* is a group of objects that are kept in the same places, so that a policy can learn where
to search. ``PLACES[kind]`` gives the weights of the receptacle classes, likeliest first.
"""

from __future__ import annotations

import dataclasses

PICK, EXAMINE, CLEAN, HEAT, COOL, PICK_TWO = "pick", "examine", "clean", "heat", "cool", "pick_two"
FAMILIES = (PICK, EXAMINE, CLEAN, HEAT, COOL, PICK_TWO)

LAMP = "desklamp"
LAMP_PLACES = {"desk": 4, "sidetable": 2, "dresser": 1}

OPENABLE = frozenset({"cabinet", "drawer", "fridge", "microwave", "safe"})

# Open surfaces accept every object. Other receptacles accept only the kinds that list them below.
SURFACES = frozenset(
    {
        "armchair",
        "bed",
        "coffeetable",
        "countertop",
        "desk",
        "diningtable",
        "dresser",
        "shelf",
        "sidetable",
        "sofa",
    }
)

KINDS = {
    "food": ("apple", "bread", "egg", "lettuce", "potato", "tomato"),
    "dish": ("bowl", "cup", "mug", "pan", "plate", "pot"),
    "cutlery": ("butterknife", "fork", "knife", "ladle", "spatula", "spoon"),
    "paper": ("book", "creditcard", "newspaper", "pen", "pencil"),
    "gadget": ("alarmclock", "cd", "cellphone", "keychain", "laptop", "remotecontrol", "watch"),
    "soft": ("cloth", "pillow", "teddybear", "towel"),
    "decor": ("box", "candle", "statue", "tissuebox", "vase"),
    "bath": ("soapbar", "soapbottle", "spraybottle", "toiletpaper"),
    "wash": ("dishsponge", "handtowel", "plunger", "scrubbrush", "toiletpaperroll", "wateringcan"),
}
_HOUSEHOLD_KINDS = tuple(
    kind for kind in KINDS if kind != "wash"
)  # the household's levels are older than this kind; adding it would change their tasks
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}

PLACES: dict[str, dict[str, int]] = {
    "food": {
        "countertop": 8, "diningtable": 5, "coffeetable": 2, "desk": 1,
        "fridge": 8, "microwave": 2, "sinkbasin": 2,
    },
    "dish": {
        "diningtable": 8, "countertop": 5, "desk": 2, "coffeetable": 1,
        "cabinet": 6, "sinkbasin": 3, "microwave": 1, "stoveburner": 2, "coffeemachine": 1,
    },
    "cutlery": {"countertop": 6, "diningtable": 5, "drawer": 6, "sinkbasin": 3},
    "paper": {"desk": 8, "coffeetable": 5, "sofa": 2, "bed": 1, "drawer": 4, "shelf": 3, "sidetable": 3},
    "gadget": {
        "sofa": 8, "bed": 5, "coffeetable": 2, "desk": 1,
        "drawer": 4, "sidetable": 4, "dresser": 3, "safe": 2,
    },
    "soft": {"bed": 8, "sofa": 5, "desk": 2, "coffeetable": 1, "armchair": 4, "dresser": 2},
    "decor": {
        "coffeetable": 8, "desk": 5, "diningtable": 2, "countertop": 1,
        "shelf": 5, "dresser": 3, "sidetable": 2, "safe": 2,
    },
    "bath": {"countertop": 6, "shelf": 4, "toilet": 5, "sinkbasin": 3, "cabinet": 4, "garbagecan": 1},
    "wash": {"countertop": 5, "sinkbasin": 3, "cabinet": 5, "bathtubbasin": 4, "shelf": 3, "toilet": 1},
}  # fmt: skip

CLEANABLE = frozenset(
    {*KINDS["dish"], *KINDS["cutlery"], "apple", "cloth", "egg", "lettuce", "potato", "soapbar", "tomato"}
)
HEATABLE = frozenset({*KINDS["food"], "cup", "mug", "plate"}) - {"lettuce"}
COOLABLE = frozenset({*KINDS["food"], *KINDS["dish"]})
SLICEABLE = frozenset({"apple", "bread", "egg", "lettuce", "potato", "tomato"})
VESSELS = frozenset({*KINDS["dish"], "box"})
KNIVES = frozenset({"butterknife", "knife"})
CHANGEABLE = {CLEAN: CLEANABLE, HEAT: HEATABLE, COOL: COOLABLE}


MAX_INSTANCES = 3  # largest number of instances of one object class in a house


def can_contain(receptacle: str, thing: str) -> bool:
    """Return whether objects of class ``thing`` may be put into receptacles of class ``receptacle``."""
    return receptacle in SURFACES or receptacle in PLACES.get(KIND_OF.get(thing, ""), ())


@dataclasses.dataclass(frozen=True)
class Room:
    """A room of a level.

    Attributes:
      name: name, for example ``kitchen``.
      always: receptacle classes that the room has in every house; a repeated class gives several instances.
      sometimes: further receptacle classes; ``some`` of them are drawn.
      some: smallest and largest number of receptacles drawn from ``sometimes``.
    """

    name: str
    always: tuple[str, ...]
    sometimes: tuple[str, ...] = ()
    some: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Level:
    """A preset of difficulty.

    Attributes:
      name: value of the ``level`` option.
      rooms: the rooms of every house.
      objects: object classes that may occur.
      num_classes: number of different object classes in a house.
      copies: smallest and largest number of additional instances of these classes.
      families: task families with their weights.
      max_turns: default turn limit; the search expert always stays within it.
      train_tasks: size of the training panel.
    """

    name: str
    rooms: tuple[Room, ...]
    objects: tuple[str, ...]
    num_classes: int
    copies: tuple[int, int]
    families: tuple[tuple[str, int], ...]
    max_turns: int
    train_tasks: int = 20_000


def of_kinds(*kinds: str) -> tuple[str, ...]:
    """Return the object classes of some kinds, sorted."""
    return tuple(sorted(name for kind in kinds for name in KINDS[kind]))


_TINY = Level(
    name="tiny",
    rooms=(
        Room("kitchen", ("countertop", "diningtable")),
        Room("bedroom", ("bed", "desk")),
        Room("livingroom", ("coffeetable", "sofa")),
    ),
    objects=(
        *("apple", "bread", "egg", "bowl", "mug", "plate", "book", "newspaper", "pen"),
        *("cellphone", "keychain", "laptop", "watch", "pillow", "teddybear", "candle", "statue", "vase"),
    ),
    num_classes=6,
    copies=(0, 0),
    families=((PICK, 2), (EXAMINE, 1)),
    max_turns=10,
    train_tasks=16_384,
)

_EASY = Level(
    name="easy",
    rooms=(
        Room("kitchen", ("countertop", "diningtable", "fridge", "sinkbasin")),
        Room("bedroom", ("bed", "desk"), ("drawer", "dresser", "sidetable"), (1, 2)),
        Room("livingroom", ("coffeetable", "sofa"), ("armchair", "shelf", "sidetable"), (1, 1)),
    ),
    objects=of_kinds("food", "dish", "paper", "gadget", "soft", "decor"),
    num_classes=8,
    copies=(0, 1),
    families=((PICK, 2), (EXAMINE, 1), (CLEAN, 1), (COOL, 1)),
    max_turns=25,
)

_MEDIUM = Level(
    name="medium",
    rooms=(
        Room(
            "kitchen",
            ("countertop", "diningtable", "fridge", "microwave", "sinkbasin", "cabinet"),
            ("cabinet", "drawer", "garbagecan", "shelf"),
            (1, 2),
        ),
        Room("bedroom", ("bed", "desk", "drawer"), ("drawer", "dresser", "sidetable", "shelf"), (1, 2)),
        Room("livingroom", ("coffeetable", "sofa"), ("armchair", "shelf", "sidetable", "safe"), (1, 2)),
        Room("bathroom", ("countertop", "sinkbasin", "toilet"), ("cabinet", "shelf", "garbagecan"), (0, 1)),
    ),
    objects=of_kinds(*_HOUSEHOLD_KINDS),
    num_classes=10,
    copies=(2, 4),
    families=tuple((family, 1) for family in FAMILIES),
    max_turns=40,
)

_HARD = Level(
    name="hard",
    rooms=(
        Room(
            "kitchen",
            ("countertop", "diningtable", "fridge", "microwave", "sinkbasin", "cabinet", "cabinet", "drawer"),
            ("cabinet", "cabinet", "countertop", "drawer", "drawer", "garbagecan", "shelf"),
            (3, 5),
        ),
        Room(
            "bedroom",
            ("bed", "desk", "drawer", "drawer"),
            ("drawer", "drawer", "dresser", "sidetable", "shelf", "armchair", "safe"),
            (2, 4),
        ),
        Room(
            "livingroom",
            ("coffeetable", "sofa", "sidetable"),
            ("armchair", "drawer", "shelf", "shelf", "safe", "dresser"),
            (2, 3),
        ),
        Room(
            "bathroom",
            ("countertop", "sinkbasin", "toilet", "cabinet"),
            ("cabinet", "shelf", "garbagecan"),
            (1, 2),
        ),
    ),
    objects=of_kinds(*_HOUSEHOLD_KINDS),
    num_classes=18,
    copies=(6, 12),
    families=tuple((family, 1) for family in FAMILIES),
    max_turns=50,
)

LEVELS = {level.name: level for level in (_TINY, _EASY, _MEDIUM, _HARD)}
