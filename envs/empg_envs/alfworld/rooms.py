"""Presets of generated ALFWorld games: one room per game, as in the official games.

A preset consists of one or more levels of the household generator with a single room. The tables of the
objects' places and properties are the household's own.
"""

from __future__ import annotations

from empg_envs.household.tables import CLEAN, COOL, EXAMINE, HEAT, PICK, PICK_TWO, Level, Room, of_kinds

_MAX_TURNS = 50
_TRAIN_TASKS = 100_000


def _level(
    name: str,
    *,
    always: tuple[str, ...],
    sometimes: tuple[str, ...],
    some: tuple[int, int],
    objects: tuple[str, ...],
    num_classes: int,
    families: dict[str, int],
) -> Level:
    return Level(
        name=f"alfworld-{name}",
        rooms=(Room(name, always, sometimes, some),),
        objects=objects,
        num_classes=num_classes,
        copies=(4, 9),
        families=tuple(families.items()),
        max_turns=_MAX_TURNS,
        train_tasks=_TRAIN_TASKS,
    )


_KITCHEN = _level(
    "kitchen",
    always=(
        *("countertop", "countertop", "fridge", "microwave", "sinkbasin", "coffeemachine", "garbagecan"),
        *("cabinet",) * 4,
        *("drawer",) * 3,
        *("stoveburner",) * 4,
    ),
    sometimes=(*("cabinet",) * 6, *("drawer",) * 4, "shelf", "shelf", "diningtable", "countertop"),
    some=(3, 9),
    objects=of_kinds("food", "dish", "cutlery"),
    num_classes=10,
    families={PICK: 2, CLEAN: 3, HEAT: 3, COOL: 3, PICK_TWO: 1},
)
_BEDROOM = _level(
    "bedroom",
    always=("bed", "desk", "drawer", "drawer", "drawer", "garbagecan", "sidetable"),
    sometimes=(*("drawer",) * 4, *("shelf",) * 4, "armchair", "dresser", "safe", "sidetable"),
    some=(1, 7),
    objects=of_kinds("paper", "gadget", "soft", "decor"),
    num_classes=10,
    families={PICK: 2, EXAMINE: 2, PICK_TWO: 2},
)
_LIVINGROOM = _level(
    "livingroom",
    always=("coffeetable", "garbagecan", "sidetable", "sidetable", "sofa"),
    sometimes=(*("drawer",) * 4, "shelf", "armchair", "armchair", "desk", "diningtable", "dresser", "safe"),
    some=(2, 7),
    objects=of_kinds("paper", "gadget", "soft", "decor"),
    num_classes=9,
    families={PICK: 2, EXAMINE: 2, PICK_TWO: 2},
)
_BATHROOM = _level(
    "bathroom",
    always=("countertop", "garbagecan", "sinkbasin", "toilet", "cabinet", "cabinet", "bathtubbasin"),
    sometimes=("cabinet", "cabinet", "shelf", "shelf", "sinkbasin", "countertop"),
    some=(1, 5),
    objects=(*of_kinds("bath", "wash"), "candle", "tissuebox", "vase"),
    num_classes=7,
    families={PICK: 2, CLEAN: 1, PICK_TWO: 2},
)
# A preset for a small policy: one family, six receptacles without doors, few objects.
_TINY = Level(
    name="alfworld-tiny",
    rooms=(Room("room", ("bed", "coffeetable", "countertop", "desk", "diningtable", "sofa")),),
    objects=(
        *("apple", "bread", "egg", "bowl", "mug", "plate", "book", "newspaper", "pen"),
        *("cellphone", "keychain", "laptop", "watch", "pillow", "teddybear", "candle", "statue", "vase"),
    ),
    num_classes=6,
    copies=(0, 0),
    families=((PICK, 1),),
    max_turns=12,
    train_tasks=16_384,
)

ROOMS = {"kitchen": _KITCHEN, "bedroom": _BEDROOM, "livingroom": _LIVINGROOM, "bathroom": _BATHROOM}
PRESETS: dict[str, tuple[Level, ...]] = {
    "tiny": (_TINY,),
    **{name: (level,) for name, level in ROOMS.items()},
    "rooms": tuple(ROOMS.values()),
}
