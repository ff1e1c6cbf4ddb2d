"""Reading problems and game files: names, goals, quirks of the start, what is refused and how it is told."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empg_envs.alfworld import files
from empg_envs.alfworld.env import AlfworldEnv
from empg_envs.alfworld.files import OfficialPanels
from empg_envs.alfworld.game import Game, name_entities, parse_game
from empg_envs.alfworld.generator import GeneratedPanels
from empg_envs.alfworld.goal import recognize
from empg_envs.alfworld.problem import GameFileError, parse_problem
from empg_envs.alfworld.release import ReleaseGrammar, ReleaseTexts
from empg_envs.alfworld.writer import make_content, write_game
from empg_envs.cache import build_once
from empg_envs.household.goals import HouseholdGoal
from empg_envs.household.world import World

# Two drawers at one place; the book in one of them and on the desk at once; an apple on the floor there.
PROBLEM = """
(define (problem p) (:domain alfred)
(:objects agent1 - agent BookType - otype AppleType - otype KnifeType - otype
  DrawerType - rtype DeskType - rtype)
(:init ; a comment
  (= (total-cost) 0)
  (atLocation agent1 loc_bar_9)
  (receptacleType Drawer_bar_1 DrawerType) (receptacleAtLocation Drawer_bar_1 loc_bar_1)
  (openable Drawer_bar_1)
  (receptacleType Drawer_bar_2 DrawerType) (receptacleAtLocation Drawer_bar_2 loc_bar_1)
  (receptacleType Desk_bar_1 DeskType) (receptacleAtLocation Desk_bar_1 loc_bar_2)
  (objectType Book_bar_1 BookType) (pickupable Book_bar_1) (objectAtLocation Book_bar_1 loc_bar_2)
  (inReceptacle Book_bar_1 Drawer_bar_2) (inReceptacle Book_bar_1 Desk_bar_1)
  (objectType Apple_bar_1 AppleType) (sliceable Apple_bar_1) (objectAtLocation Apple_bar_1 loc_bar_1)
  (objectType Knife_bar_1 KnifeType) (pickupable Knife_bar_1) (isCool Knife_bar_1)
  (inReceptacle Knife_bar_1 Drawer_bar_2) (objectAtLocation Knife_bar_1 loc_bar_1)
  (canContain DrawerType BookType) (canContain DeskType BookType) (canContain DrawerType KnifeType))
(:goal (and (exists (?r - receptacle) (exists (?o - object)
  (and (inReceptacle ?o ?r) (objectType ?o BookType) (receptacleType ?r DrawerType)))))))
"""
GRAMMAR = '{"task": [{"rhs": "Your task is to: put a book in drawer."}]}'


def make(problem: str = PROBLEM, grammar: str = GRAMMAR) -> Game:
    return parse_game({"pddl_problem": problem, "grammar": grammar, "solvable": True})


def replies(commands: list[str], game: Game | None = None) -> list[str]:
    game = game or make()
    world, grammar, told = World(game.scene), ReleaseGrammar(), []
    for text in commands:
        command = grammar.parse(text)
        done = command is not None and world.apply(command)
        told.append(ReleaseTexts().reply(game, world, command if done else None))
    return told


def test_numbers_are_handed_out_from_the_end_and_basins_are_named() -> None:
    ids = ["mug_bar_2", "mug_bar_1", "sink_bar_1_bar_sinkbasin", "sink_bar_1", "loc_bar_b", "loc_bar_a"]
    assert name_entities(ids) == {
        "mug_bar_1": "mug 2",
        "mug_bar_2": "mug 1",
        "sink_bar_1": "sink 1",
        "sink_bar_1_bar_sinkbasin": "sinkbasin 1",
        "loc_bar_a": "loc 2",
        "loc_bar_b": "loc 1",
    }


def test_opening_lists_all_and_a_look_from_nowhere_none() -> None:
    game = make()
    room = "You are in the middle of a room. Looking quickly around you, you see"
    assert ReleaseTexts().opening(game, World(game.scene)) == (
        f"-= Welcome to TextWorld, ALFRED! =-\n\n{room} a desk 1, a drawer 2, and a drawer 1.\n\n"
        "Your task is to: put a book in drawer."
    )
    assert replies(["look"]) == [f"{room} nothing."]


def test_what_was_moved_between_neighbors_lies_next_to_them() -> None:
    told = replies(
        [
            *("go to drawer 1", "look", "take knife 1 from drawer 1", "examine knife 1", "open drawer 2"),
            *("move knife 1 to drawer 2", "look", "take knife 1 from drawer 2", "move knife 1 to drawer 1"),
            "look",
        ]
    )
    facing = "You are facing the drawer 2, and drawer 1. Next to it, you see"
    assert told[0] == "You arrive at drawer 1. On the drawer 1, you see a book 1, and a knife 1."
    assert (told[1], told[6]) == (f"{facing} nothing.", f"{facing} a knife 1.")
    assert told[3] == "This is a cold knife 1."
    # Back in the first drawer it still counts as taken out of the second.
    assert told[9] == f"{facing} a knife 1."


def test_it_is_listed_once_for_every_neighbor_that_it_was_taken_from() -> None:
    third = "(receptacleType Drawer_bar_3 DrawerType) (receptacleAtLocation Drawer_bar_3 loc_bar_1)"
    told = replies(
        [
            *("go to drawer 2", "take knife 1 from drawer 2", "move knife 1 to drawer 1"),
            *("take knife 1 from drawer 1", "open drawer 3", "move knife 1 to drawer 3", "look"),
        ],
        make(PROBLEM.replace("(receptacleType Desk", f"{third} (receptacleType Desk")),
    )
    facing = "You are facing the drawer 3, drawer 2, and drawer 1. Next to it, you see"
    assert told[-1] == f"{facing} a knife 1, and a knife 1."


def test_a_thing_in_two_places_is_carried_and_still_there() -> None:
    told = replies(["go to desk 1", "take book 1 from desk 1", "go to drawer 1", "move book 1 to drawer 1"])
    assert told[2] == "You arrive at drawer 1. On the drawer 1, you see a book 1, and a knife 1."
    assert told[3] == "You move the book 1 to the drawer 1."
    world = World(make().scene)
    assert world.contents["drawer 1"].count("book 1") == 1


def test_the_floor_can_be_sliced_but_not_picked_up() -> None:
    told = replies(
        ["go to drawer 1", "take knife 1 from drawer 1", "slice apple 1 with knife 1", "examine apple 1"]
    )
    assert told[2:] == ["You sliced the apple 1 with the knife 1.", "Nothing happens."]


@pytest.mark.parametrize(
    ("text", "verb"),
    [(" look\n", "look"), ("Look", None), ("go  to desk 1", None), ("put book 1 in/on desk 1", None)],
)
def test_commands_are_taken_to_the_letter(text: str, verb: str | None) -> None:
    command = ReleaseGrammar().parse(text)
    assert (command and command.verb) == verb


def test_the_older_release_has_its_own_words() -> None:
    grammar = ReleaseGrammar("2.1.1")
    put = grammar.parse("put book 1 in/on desk 1")
    assert put is not None and tuple(put) == ("move", "book 1", "desk 1")
    assert grammar.parse("move book 1 to desk 1") is None and grammar.parse("help") is None
    assert grammar.spell(["help", "look", "move book 1 to desk 1"]) == ["look", "put book 1 in/on desk 1"]


@pytest.mark.parametrize(("release", "can_clean"), [("2.1.1", True), ("2.1.2", False)])
def test_only_the_older_release_cleans_in_a_sink_without_basin(
    release: str, can_clean: bool, tmp_path: Path
) -> None:
    problem = PROBLEM.replace("DeskType", "SinkType").replace("(:init", "(:init (cleanable Book_bar_1)")
    problem = problem.replace("(inReceptacle Book_bar_1 Drawer_bar_2)", "")  # the goal would be met at once
    (tmp_path / "train" / "trial").mkdir(parents=True)
    content = {"pddl_problem": problem, "grammar": GRAMMAR, "solvable": True}
    (tmp_path / "train" / "trial" / "game.tw-pddl").write_text(json.dumps(content))
    env = AlfworldEnv(data=str(tmp_path), release=release)
    env.reset()
    env.step("go to desk 1")
    *_, info = env.step("take book 1 from desk 1")
    assert ("clean book 1 with desk 1" in info["admissible"]) == can_clean
    observation, *_ = env.step("clean book 1 with desk 1")
    assert observation == ("You clean the book 1 using the desk 1." if can_clean else "Nothing happens.")


def test_every_family_is_recognised_however_its_goal_is_nested_and_named() -> None:
    panels = GeneratedPanels("rooms")
    families = set()
    for index in range(60):
        game = panels.make("train", index)
        problem = make_content(game)["pddl_problem"]
        renamed = problem.replace("?o", "?x").replace("?r", "?o").replace("?p", "?r")
        for text in (
            problem,
            renamed,
            problem.replace("(:goal (and", "(:goal (and (and").rstrip()[:-1] + "))",
        ):
            assert recognize(parse_problem(text)) == game.goal
        families.add(game.goal.family)
    assert len(families) == 6


GOAL = PROBLEM[PROBLEM.index("(:goal") :]


@pytest.mark.parametrize(
    ("problem", "kind", "reason"),
    [
        (PROBLEM[:-30], "malformed", "parentheses"),
        (PROBLEM.replace("(:goal", "(:gaol"), "malformed", r"sections \(:objects"),
        (PROBLEM.replace("BookType) (rec", "val1) (rec"), "malformed", "undeclared object 'val1'"),
        (PROBLEM.replace("(inReceptacle ?o ?r)", "(isSliced ?o)"), "malformed", "none of the six"),
        (
            PROBLEM.replace("(and (inReceptacle", "(or (inReceptacle"),
            "malformed",
            "'or' is not understood in a",
        ),
        (PROBLEM.replace("(atLocation agent1 loc_bar_9)", ""), "malformed", "wrong number"),
        (PROBLEM.replace("(objectType Book_bar_1 BookType)", ""), "malformed", "book_bar_1"),
        (PROBLEM.replace("(inReceptacle Knife_bar_1 Drawer_bar_2)", "(inReceptacle)"), "malformed", "number"),
        (PROBLEM.replace("Drawer_bar_1 loc_bar_1", "Drawer_bär_1 loc_bar_1"), "malformed", "ASCII"),
        (PROBLEM.replace("(isCool", "(holds agent1 Knife_bar_1) (isCool"), "malformed", "something in hand"),
        (PROBLEM.replace("(pickupable Book_bar_1)", ""), "unsolvable", "needs 1 fit book, has 0"),
        (PROBLEM.replace("(canContain DrawerType BookType)", ""), "unsolvable", "no book can be put into"),
        (PROBLEM.replace("?r DrawerType", "?r KnifeType"), "unsolvable", "there is no knife"),
    ],
)
def test_what_cannot_be_played_is_refused_with_the_reason(problem: str, kind: str, reason: str) -> None:
    with pytest.raises(GameFileError, match=reason) as caught:
        make(problem)
    assert caught.value.kind == kind


def test_a_grammar_without_a_task_is_refused() -> None:
    for grammar in ("{}", GRAMMAR.replace("put a book in drawer", "UNKNOWN GOAL")):
        with pytest.raises(GameFileError, match="task sentence"):
            make(grammar=grammar)


@settings(max_examples=80, deadline=None)
@given(
    start=st.integers(0, len(PROBLEM)), length=st.integers(0, 200), filler=st.text("() ?-;ab_", max_size=8)
)
def test_a_damaged_problem_plays_or_is_refused(start: int, length: int, filler: str) -> None:
    try:
        game = make(PROBLEM[:start] + filler + PROBLEM[start + length :])
    except GameFileError:
        return
    world = World(game.scene)
    ReleaseTexts().opening(game, world)
    world.admissible()


def fill(root: Path, count: int = 3) -> list[Path]:
    panels = GeneratedPanels("kitchen")
    return [write_game(panels.make("train", n), root, "train", f"trial_{n}") for n in range(count)]


def test_a_folder_is_opened_and_what_is_broken_named_and_counted(tmp_path: Path) -> None:
    root = tmp_path / "json_2.1.2"
    good, unsolvable, cut = fill(root)
    content = json.loads(unsolvable.read_text())
    unsolvable.write_text(json.dumps({**content, "solvable": False}))
    cut.write_text(cut.read_text()[:-100])
    for name in ("pick_movable-Mug-None-Desk-1", "pick-AppleSliced-None-Desk-2"):
        (root / "train" / name).mkdir()
        (root / "train" / name / "game.tw-pddl").write_text("{}")
    (root / "train" / "empty").mkdir()
    (root / "train" / "empty" / "game.tw-pddl").write_bytes(b"\xff\x00")
    with pytest.warns(UserWarning, match=r"2 malformed, 1 unsolvable, 2 unsupported.*trial_2/game"):
        panels = OfficialPanels(tmp_path)
    assert (panels.list_splits(), panels.num_tasks("train")) == (["train"], 1)
    assert panels.describe("train", 0)["id"] == good.parent.relative_to(root).as_posix()
    reasons = {each.path.parent.name: (each.kind, each.reason) for each in panels.skipped}
    assert reasons["trial_1"] == ("unsolvable", "the file says solvable=False")
    assert reasons["trial_2"][0] == reasons["empty"][0] == "malformed"
    assert "not a readable JSON file" in reasons["empty"][1]


def test_games_are_parsed_once_and_shared_by_all_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data, parsed = tmp_path / "data", []
    fill(data / "json_2.1.2")
    judge = files.parse_game
    monkeypatch.setattr(files, "parse_game", lambda content: parsed.append(content) or judge(content))
    first = AlfworldEnv(data=str(data))
    assert len(parsed) == 3
    second = AlfworldEnv(data=str(data))
    assert len(parsed) == 3 and second.panel_hash("train") == first.panel_hash("train")
    # Another content is another index, wherever it lies; the same content is not.
    changed = fill(data / "json_2.1.2")[0]
    changed.write_text(changed.read_text().replace("Your task is to: ", "Your task is to: please ", 1))
    assert AlfworldEnv(data=str(data)).panel_hash("train") != first.panel_hash("train") and len(parsed) == 6
    shutil.copytree(data, tmp_path / "copy")
    AlfworldEnv(data=str(tmp_path / "copy"))
    assert len(parsed) == 6
    # Without a place for the index, games are played all the same.
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert AlfworldEnv(data=str(tmp_path / "copy")).num_tasks("train") == 3 and len(parsed) == 9


def test_processes_that_want_the_same_file_build_it_once(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from empg_envs.cache import build_once\n"
        "def build(path):\n"
        "    path.write_text('x'); time.sleep(0.2); open(sys.argv[2], 'a').write('built ')\n"
        "print(build_once(pathlib.Path(sys.argv[1]), build).read_text())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "deep" / "file"), str(tmp_path / "diary")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=300)[0] for process in processes] == ["x\n"] * 3
    assert (tmp_path / "diary").read_text() == "built "
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["file", "file.lock"]


def test_what_killed_builders_left_is_removed(tmp_path: Path) -> None:
    """The next process may even have the number of the one that was killed."""
    for name in (f"index.{os.getpid()}.part", "index.1.part", "other.1.part"):
        (tmp_path / name).mkdir()
    build_once(tmp_path / "index", lambda path: path.mkdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "index.lock", "other.1.part"]


def test_missing_data_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    with pytest.raises(
        FileNotFoundError, match=r"neither env\.options\.data nor ALFWORLD_DATA.*alfworld-download"
    ):
        AlfworldEnv(source="official")
    with pytest.raises(FileNotFoundError, match=r"env\.options\.data=.*nowhere is no folder.*source=auto"):
        AlfworldEnv(data=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="holds neither"):
        AlfworldEnv(data=str(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="no playable"):
        AlfworldEnv(data=str(tmp_path))
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"ALFWORLD_DATA=.*nowhere is no folder"):
        AlfworldEnv()
    with pytest.warns(UserWarning, match=r"ALFWORLD_DATA=.*nowhere is no folder.*Playing generated games"):
        assert AlfworldEnv(source="auto").list_splits() == ["train", "valid", "test"]
    with pytest.raises(FileNotFoundError, match="no playable"):
        AlfworldEnv(source="auto", data=str(tmp_path))
    monkeypatch.delenv("ALFWORLD_DATA")
    assert AlfworldEnv(source="auto").list_splits() == ["train", "valid", "test"]


def test_a_level_is_of_generated_games(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(ValueError, match="level='kitchen' has no effect with official games"):
        AlfworldEnv(data=str(tmp_path), level="kitchen")
    with pytest.raises(ValueError, match="unknown alfworld level 'kitchn'; did you mean 'kitchen'"):
        AlfworldEnv(data=str(tmp_path), level="kitchn")


def test_the_variable_names_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = AlfworldEnv()
    assert env.num_tasks("train") == 3 and env.get_task("train", 0)["source"] == "official"
    assert AlfworldEnv(source="generated").num_tasks("train") > 3


ACTIONS = st.one_of(
    st.binary(max_size=300).map(lambda raw: raw.decode("utf-8", "surrogateescape")),
    st.binary(max_size=300).map(lambda raw: raw.decode("latin-1")),
    st.text(max_size=300),
    st.builds(lambda text, times: text * times, st.text(max_size=9), st.integers(1, 20_000)),
    st.from_regex(r"(go to|take|put|use|slice) [a-z]{1,9} [0-9]{1,40}( (from|in/on|with) [a-z]+ [0-9]+)?"),
)


@settings(max_examples=120, deadline=None)
@given(actions=st.lists(ACTIONS, min_size=1, max_size=4), release=st.sampled_from(["2.1.1", "2.1.2"]))
def test_any_bytes_at_any_length_get_a_defined_reply(actions: list[str], release: str) -> None:
    env = AlfworldEnv(source="generated", release=release)
    _, info = env.reset(split="train", index=1)
    for action in actions:
        is_known = action.strip() in info["admissible"]
        observation, reward, terminated, truncated, info = env.step(action)
        assert (observation == "Nothing happens.") == (not is_known)
        assert (reward, terminated, truncated) == (0.0, False, False)


def test_unknown_choices_are_named() -> None:
    for options, message in (
        ({"release": "2.1"}, "unknown alfworld release '2.1'; the choices are 2.1.2, 2.1.1"),
        ({"expert": "oracle"}, "unknown alfworld expert 'oracle'; the choices are solver, search"),
        ({"source": "files"}, "unknown alfworld source 'files'"),
        ({"level": "kitchn"}, "did you mean 'kitchen'"),
        ({"source": "generated", "data": "x"}, "has no effect with source='generated'"),
        ({"max_turns": 0}, "alfworld max_turns must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            AlfworldEnv(**options)  # type: ignore[arg-type]


def test_goals_are_household_goals() -> None:
    assert make().goal == HouseholdGoal("pick", "book", "drawer")
