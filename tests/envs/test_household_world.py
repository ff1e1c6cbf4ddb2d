"""The household's rules, one by one, and their ALFWorld texts."""

import random

import pytest

from empg_envs.alfworld.env import AlfworldEnv
from empg_envs.household import commands
from empg_envs.household.commands import Command
from empg_envs.household.env import HouseholdEnv
from empg_envs.household.goals import HouseholdGoal
from empg_envs.household.tables import can_contain
from empg_envs.household.tasks import Game
from empg_envs.household.texts import AlfworldTexts, TerseTexts, list_names
from empg_envs.household.world import Scene, World

ROOMS = {
    "kitchen": ("countertop 1", "fridge 1", "microwave 1", "sinkbasin 1"),
    "bedroom": ("desk 1", "drawer 1", "drawer 2"),
}
START = {
    "countertop 1": ("knife 1", "mug 1"),
    "fridge 1": ("apple 2", "apple 1"),
    "microwave 1": (),
    "sinkbasin 1": (),
    "desk 1": ("book 1", "desklamp 1"),
    "drawer 1": ("pen 1",),
    "drawer 2": (),
}


@pytest.fixture
def scene() -> Scene:
    things = [thing for inside in START.values() for thing in inside]
    class_of = {name: name.split()[0] for name in [*START, *things]}
    return Scene(
        rooms=ROOMS,
        class_of=class_of,
        order={name: rank for rank, name in enumerate(sorted(things, reverse=True))},
        location_of={name: name for name in START},
        at_location={name: (name,) for name in START},
        openable=frozenset({"fridge 1", "microwave 1", "drawer 1", "drawer 2"}),
        start=START,
        fits=frozenset(
            (r.split()[0], t.split()[0])
            for r in START
            for t in things
            if can_contain(r.split()[0], t.split()[0])
        ),
        pickupable=frozenset(things) - {"desklamp 1"},
        toggleable=frozenset({"desklamp 1"}),
        cleanable=frozenset({"apple 1", "apple 2", "mug 1"}),
        heatable=frozenset({"apple 1", "apple 2", "mug 1"}),
        coolable=frozenset({"apple 1", "apple 2", "mug 1"}),
        sliceable=frozenset({"apple 1", "apple 2"}),
        knives=frozenset({"knife 1"}),
        vessels=frozenset({"mug 1"}),
    )


def play(scene: Scene, texts: list[str], goal: HouseholdGoal | None = None) -> tuple[World, list[str]]:
    """Carries out commands and returns the world with every ALFWorld reply."""
    world = World(scene)
    game = Game(scene, goal or HouseholdGoal("pick", "apple", "desk"), 0, "")
    replies = []
    for text in texts:
        command = commands.parse(text)
        assert command is not None
        replies.append(AlfworldTexts().reply(game, world, command if world.apply(command) else None))
    return world, replies


def test_alfworld_sentences(scene: Scene) -> None:
    script = {
        "look": "You are in the middle of a house. In the kitchen, you see a countertop 1, a fridge 1, "
        "a microwave 1, and a sinkbasin 1. In the bedroom, you see a desk 1, a drawer 1, and a drawer 2.",
        "inventory": "You are not carrying anything.",
        "go to fridge 1": "You arrive at fridge 1. The fridge 1 is closed.",
        "take apple 1 from fridge 1": "Nothing happens.",
        "open fridge 1": "You open the fridge 1. The fridge 1 is open. In it, you see a apple 2, "
        "and a apple 1.",
        "open  Fridge 1": "Nothing happens.",
        " take apple 1 from fridge 1": "You pick up the apple 1 from the fridge 1.",
        "inventory ": "You are carrying: a apple 1.",
        "examine apple 1": "There's nothing special about apple 1.",
        "cool apple 1 with fridge 1": "You cool the apple 1 using the fridge 1.",
        " examine apple 1": "This is a cold apple 1.",
        "close fridge 1": "You close the fridge 1.",
        "examine fridge 1": "The fridge 1 is closed.",
        "move apple 1 to fridge 1": "Nothing happens.",
        "go to sinkbasin 1": "You arrive at sinkbasin 1. On the sinkbasin 1, you see nothing.",
        "clean apple 1 with sinkbasin 1": "You clean the apple 1 using the sinkbasin 1.",
        "examine  apple 1": "This is a cool and clean apple 1.",
        "go to microwave 1": "You arrive at microwave 1. The microwave 1 is closed.",
        "heat apple 1 with microwave 1": "You heat the apple 1 using the microwave 1.",
        "Examine apple 1": "This is a hot and clean apple 1.",
        "go to desk 1": "You arrive at desk 1. On the desk 1, you see a book 1, and a desklamp 1.",
        "take book 1 from desk 1": "Nothing happens.",
        "move apple 1 to desk 1": "You move the apple 1 to the desk 1.",
        "take desklamp 1 from desk 1": "Nothing happens.",
        "use desklamp 1": "You turn on the desklamp 1.",
        "use  desklamp 1": "You turn on the desklamp 1.",
        " look": "You are facing the desk 1. Next to it, you see nothing.",
    }
    _, replies = play(scene, list(script))
    assert dict(zip(script, replies, strict=True)) == script


def test_slicing_takes_a_knife_in_hand(scene: Scene) -> None:
    opening = ["go to fridge 1", "open fridge 1"]
    _, replies = play(scene, [*opening, "slice apple 1 with knife 1"])
    assert replies[-1] == "Nothing happens."
    world, replies = play(
        scene,
        [
            *("go to countertop 1", "take knife 1 from countertop 1", *opening),
            *("slice apple 1 with knife 1", "slice knife 1 with knife 1"),
        ],
    )
    assert replies[-2:] == ["You sliced the apple 1 with the knife 1.", "Nothing happens."]
    assert world.sliced == {"apple 1"}


def test_vessels_are_looked_into(scene: Scene) -> None:
    _, replies = play(scene, ["go to countertop 1", "take mug 1 from countertop 1", "examine mug 1"])
    assert replies[-1] == "This is a normal mug 1. In it, you see nothing."


def test_heat_and_cool_undo_each_other(scene: Scene) -> None:
    take = ["go to countertop 1", "take mug 1 from countertop 1"]
    heat = ["go to microwave 1", "heat mug 1 with microwave 1"]
    cool = ["go to fridge 1", "cool mug 1 with fridge 1"]
    world, _ = play(scene, take + heat + cool)
    assert (world.hot, world.cool) == (set(), {"mug 1"})
    world, _ = play(scene, take + cool + heat)
    assert (world.hot, world.cool) == ({"mug 1"}, set())


@pytest.mark.parametrize(
    ("goal", "winning", "too_little"),
    [
        (
            HouseholdGoal("pick", "mug", "desk"),
            ["go to countertop 1", "take mug 1 from countertop 1", "go to desk 1", "move mug 1 to desk 1"],
            ["go to countertop 1", "take mug 1 from countertop 1", "go to desk 1"],
        ),
        (
            HouseholdGoal("examine", "mug", "desklamp"),
            [
                "go to desk 1",
                "use desklamp 1",
                "go to countertop 1",
                "take mug 1 from countertop 1",
                "go to desk 1",
            ],
            ["go to countertop 1", "take mug 1 from countertop 1", "go to desk 1", "examine mug 1"],
        ),
        (
            HouseholdGoal("clean", "mug", "countertop"),
            [
                *("go to countertop 1", "take mug 1 from countertop 1", "go to sinkbasin 1"),
                *("clean mug 1 with sinkbasin 1", "go to countertop 1", "move mug 1 to countertop 1"),
            ],
            ["go to countertop 1"],
        ),
        (
            HouseholdGoal("pick_two", "apple", "countertop"),
            [
                *("go to fridge 1", "open fridge 1", "take apple 1 from fridge 1", "go to countertop 1"),
                *("move apple 1 to countertop 1", "go to fridge 1", "take apple 2 from fridge 1"),
                *("go to countertop 1", "move apple 2 to countertop 1"),
            ],
            [
                *("go to fridge 1", "open fridge 1", "take apple 1 from fridge 1", "go to countertop 1"),
                "move apple 1 to countertop 1",
            ],
        ),
    ],
)
def test_goals_are_met_by_the_whole_sequence_only(
    scene: Scene, goal: HouseholdGoal, winning: list[str], too_little: list[str]
) -> None:
    world, _ = play(scene, winning, goal)
    assert goal.is_met(world)
    for steps in range(len(winning)):
        assert not goal.is_met(play(scene, winning[:steps], goal)[0])
    assert not goal.is_met(play(scene, too_little, goal)[0])


def test_hot_is_not_cool_enough(scene: Scene) -> None:
    steps = [
        *("go to countertop 1", "take mug 1 from countertop 1", "go to fridge 1", "cool mug 1 with fridge 1"),
        *("go to microwave 1", "heat mug 1 with microwave 1", "go to desk 1", "move mug 1 to desk 1"),
    ]
    world, _ = play(scene, steps)
    assert not HouseholdGoal("cool", "mug", "desk").is_met(world)
    assert HouseholdGoal("heat", "mug", "desk").is_met(world)


def every_command(scene: Scene) -> list[Command]:
    nouns = list(scene.class_of)
    found = [Command(verb) for verb in commands.BARE]
    found += [Command(verb, noun) for verb in commands.ONE_NOUN for noun in nouns]
    found += [Command(verb, a, b) for verb in commands.TWO_NOUNS for a in nouns for b in nouns]
    return found


def spell(command: Command) -> str:
    verb, first, second = command
    return " ".join(filter(None, (verb, first, commands.TWO_NOUNS.get(verb), second)))


def state(world: World) -> tuple:
    sets = (world.opened, world.clean, world.hot, world.cool, world.toggled, world.sliced)
    contents = tuple((name, tuple(inside)) for name, inside in world.contents.items())
    return world.location, world.holding, contents, *map(frozenset, sets)


@pytest.mark.parametrize("level", ["tiny", "hard"])
def test_a_command_works_exactly_when_admissible_lists_it(level: str) -> None:
    rng = random.Random(0)
    env = HouseholdEnv(level)
    env.reset(split="train", index=3)
    world = env._world
    assert world is not None
    everything = every_command(world.scene)
    for _ in range(12 if level == "hard" else 40):
        admissible = world.admissible()
        assert admissible == sorted(set(admissible))
        assert set(admissible) <= {spell(command) for command in everything}
        before = state(world)
        for command in everything:
            if spell(command) not in admissible:
                assert not world.apply(command), spell(command)
        assert state(world) == before
        action = commands.parse(rng.choice(admissible))
        assert action is not None and world.apply(action)


def test_several_receptacles_can_share_a_location(scene: Scene) -> None:
    import dataclasses

    place = {**{name: name for name in START}, "drawer 1": "wall", "drawer 2": "wall"}
    at = {where: tuple(name for name in START if place[name] == where) for where in place.values()}
    world, replies = play(
        dataclasses.replace(scene, location_of=place, at_location=at),
        [
            "go to drawer 1",
            "look",
            "go to drawer 2",
            "open drawer 2",
            "open drawer 1",
            "take pen 1 from drawer 1",
        ],
    )
    assert replies[1] == "You are facing the drawer 1, and drawer 2. Next to it, you see nothing."
    assert replies[2] == "Nothing happens."
    assert world.holding == "pen 1"
    assert "move pen 1 to drawer 2" in world.admissible()


def test_list_names() -> None:
    assert [list_names(names) for names in ([], ["x 1"], ["x 2", "x 1"], ["x 2", "x 1", "y 1"])] == [
        "nothing",
        "a x 1",
        "a x 2, and a x 1",
        "a x 2, a x 1, and a y 1",
    ]


def test_terse_view_hides_what_is_behind_a_door_and_names_the_only_instance(scene: Scene) -> None:
    world = World(scene)
    game = Game(scene, HouseholdGoal("clean", "mug", "drawer"), 0, "")
    texts = TerseTexts()
    go = Command("go to", "fridge 1")
    assert world.apply(go)
    assert (
        texts.reply(game, world, go) == "at fridge 1 : closed . holding nothing . put clean mug 1 in drawer"
    )
    assert "apple" not in texts.opening(game, world)
    assert texts.reply(game, world, None).startswith("nothing happens . at fridge 1")
    world.apply(Command("open", "fridge 1"))
    assert texts.reply(game, world, go).startswith("at fridge 1 : apple 2 apple 1 . holding nothing")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("go to fridge 1", Command("go to", "fridge 1")),
        ("  TAKE  apple 12\tfrom desk 1 ", Command("take", "apple 12", "desk 1")),
        ("slice apple 1 with knife 2", Command("slice", "apple 1", "knife 2")),
        ("look", Command("look")),
        ("look around", None),
        ("go to fridge", None),
        ("take apple 1 to desk 1", None),
        ("put apple 1 in/on desk 1", None),
        ("go to fridge 1 now", None),
        ("", None),
    ],
)
def test_grammar(text: str, expected: Command | None) -> None:
    assert commands.parse(text) == expected


def test_states_are_told_apart_where_texts_are_not():
    """What has no effect is answered by one text everywhere; the place, the things and the actions differ."""

    def play():
        env = AlfworldEnv(source="generated")
        _, info = env.reset(split="train", index=3)
        seen = []
        while not info["won"]:
            observation, *_, info = env.step("sing")
            seen.append((observation, info["state"]))
            *_, info = env.step(env.expert_action())
        return seen

    found = play()
    texts, states = zip(*found, strict=True)
    assert set(texts) == {"Nothing happens."} and len(set(states)) == len(states) > 2
    assert play() == found


def test_milestones_are_told_once_and_in_order():
    """The expert's turns: an object in hand, then its change or the first of two, then the goal."""
    env, found = HouseholdEnv("easy"), {}
    for index in range(60):
        _, info = env.reset(split="train", index=index)
        family, verbs, won = info["group"], [], False
        assert info["milestone"] is False
        for _ in range(env.max_turns):
            action = env.expert_action()
            _, _, won, truncated, info = env.step(action)
            verbs += [action.split()[0]] * info["milestone"]
            if won or truncated:
                break
        if won:
            found.setdefault(family, set()).add(tuple(verbs))
    between = {"clean": ("clean",), "heat": ("heat",), "cool": ("cool",), "pick_two": ("move",)}
    assert len(found) >= 4
    for family, orders in found.items():
        last = "use" if family == "examine" else "move"
        assert orders == {("take", *between.get(family, ()), last)}
