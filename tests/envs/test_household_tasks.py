"""Panels: deterministic, without duplicates, disjoint by content."""

import math

import pytest

from empg_envs.household import tasks
from empg_envs.household.env import HouseholdEnv
from empg_envs.household.goals import HouseholdGoal
from empg_envs.household.tables import FAMILIES, KIND_OF, LEVELS, PLACES
from empg_envs.household.world import World

# Changing any of these means that every published number belongs to other tasks.
PANEL_HASHES = {
    ("tiny", "valid"): "22c99347d176e603321fa587f01b78aec9ca82a6513e9ecc281a0c75251c5526",
    ("tiny", "test"): "f6a3ade0ff91caa22e89c9a283345dad6536fb079f2df185e7e53738debce2a3",
    ("easy", "valid"): "e2f64b7f1b8b807c30e236fd6d7d7c671b3c6eb938223cf1eda07d20ac2eadbf",
    ("medium", "valid"): "d465844681a2e6aefe9d8cec91d4c43949aac8df476c9c715c99e455e21df32b",
    ("hard", "valid"): "2c189e6cc0b11bb5b67d4ef456c293729fdc739c7c07c48578c895d4e93880e3",
}


@pytest.mark.parametrize(("level", "split"), PANEL_HASHES)
def test_panels_never_change(level: str, split: str) -> None:
    assert HouseholdEnv(level).panel_hash(split) == PANEL_HASHES[level, split]


@pytest.mark.parametrize("level", LEVELS)
def test_panels_are_disjoint_and_without_duplicates(level: str) -> None:
    env = HouseholdEnv(level)
    seen: dict[str, tuple[str, int]] = {}
    for split in env.list_splits():
        for index in range(min(env.num_tasks(split), 512)):
            content = tasks.make_game(LEVELS[level], split, index).content_hash
            assert content not in seen, f"{split} {index} repeats {seen[content]}"
            assert tasks.split_of(content) == split
            seen[content] = split, index


def test_every_index_of_a_panel_has_its_own_set_of_object_classes() -> None:
    for level in LEVELS.values():
        assert math.comb(len(level.objects), level.num_classes) >= level.train_tasks
        assert len(set(level.objects)) == len(level.objects)
    tiny = LEVELS["tiny"]
    sets = {tuple(tasks._classes_of(tiny, "train", index)) for index in range(tiny.train_tasks)}
    assert len(sets) == tiny.train_tasks


def test_unrank_enumerates_sets_in_order() -> None:
    sets = [tasks.unrank("abcd", 2, rank) for rank in range(6)]
    assert ["".join(chosen) for chosen in sets] == ["ab", "ac", "ad", "bc", "bd", "cd"]


def test_content_hash_ignores_numbers_and_notices_everything_else() -> None:
    rooms = {"kitchen": ("drawer 1", "drawer 2"), "bedroom": ("bed 1",)}
    classes = {
        "drawer 1": "drawer",
        "drawer 2": "drawer",
        "bed 1": "bed",
        "pen 1": "pen",
        "pen 2": "pen",
        "cd 1": "cd",
    }
    goal = HouseholdGoal("pick", "pen", "bed")

    def digest(things: dict[str, str], goal: HouseholdGoal = goal) -> str:
        return tasks._hash_content(rooms, things, classes, goal)

    base = digest({"pen 1": "drawer 1", "pen 2": "bed 1", "cd 1": "drawer 1"})
    assert digest({"pen 2": "drawer 1", "cd 1": "drawer 1", "pen 1": "bed 1"}) == base
    assert digest({"pen 1": "drawer 2", "pen 2": "bed 1", "cd 1": "drawer 2"}) == base
    assert digest({"pen 1": "drawer 1", "pen 2": "bed 1", "cd 1": "drawer 2"}) != base
    assert (
        digest(
            {"pen 1": "drawer 1", "pen 2": "bed 1", "cd 1": "drawer 1"}, HouseholdGoal("pick", "cd", "bed")
        )
        != base
    )


@pytest.mark.parametrize("level", LEVELS)
def test_games_start_unsolved_with_things_where_they_belong(level: str) -> None:
    preset = LEVELS[level]
    families = set()
    for index in range(200):
        game = tasks.make_game(preset, "train", index)
        families.add(game.goal.family)
        world = World(game.scene)
        assert not game.goal.is_met(world)
        class_of = game.scene.class_of
        for receptacle, inside in game.scene.start.items():
            for thing in inside:
                assert (
                    class_of[thing] == "desklamp" or class_of[receptacle] in PLACES[KIND_OF[class_of[thing]]]
                )
                assert world.is_fitting(thing, receptacle) or class_of[thing] == "desklamp"
        if game.goal.family != "examine":
            assert (game.goal.target, game.goal.thing) in game.scene.fits
    assert families == {family for family, _ in preset.families}


def test_tiny_is_as_big_as_promised_and_hard_has_everything() -> None:
    tiny = LEVELS["tiny"]
    assert len(tiny.rooms) >= 3
    assert sum(len(room.always) for room in tiny.rooms) >= 6
    assert len(tiny.families) >= 2
    assert {family for family, _ in LEVELS["hard"].families} == set(FAMILIES)


def test_bad_split_and_index_are_named() -> None:
    env = HouseholdEnv("tiny")
    with pytest.raises(ValueError, match=r"unknown split 'dev'.*train, valid, test"):
        env.num_tasks("dev")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        env.panel_hash("dev")
    with pytest.raises(IndexError, match=r"task index 512 of split 'test' is outside \[0, 512\)"):
        env.get_task("test", 512)
    with pytest.raises(TypeError):
        env.get_task("test", 1.5)  # type: ignore[arg-type]


def test_draw_is_the_same_everywhere() -> None:
    draw = tasks.Draw("a", 1)
    assert [draw.below(1000) for _ in range(4)] == [383, 722, 945, 111]
    assert sorted(tasks.Draw("b").sample("abcdef", 6)) == list("abcdef")
    weighted = tasks.Draw("c")
    counts = [weighted.weighted("xy", (3, 1)) for _ in range(4000)].count("x")
    assert 2850 < counts < 3150
