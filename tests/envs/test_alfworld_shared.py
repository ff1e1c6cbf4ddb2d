"""Against recorded originals: every step of every trace, every game, both releases."""

import gzip
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from empg_envs.alfworld.env import AlfworldEnv
from empg_envs.alfworld.files import OfficialPanels
from empg_envs.alfworld.game import Game, load_game
from empg_envs.alfworld.release import ReleaseGrammar, ReleaseTexts
from empg_envs.household import expert, solver
from empg_envs.household.world import World
from tests.shared import find_shared

pytestmark = pytest.mark.shared_data


@pytest.fixture(scope="module")
def index() -> dict[str, dict]:
    lines = find_shared("alfworld", "index_dev.jsonl").read_text().splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alfworld")
    with tarfile.open(find_shared("alfworld", "games_dev.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def games(data: Path) -> dict[str, Game]:
    root = data / "json_2.1.1"
    return {path.parent.relative_to(root).as_posix(): load_game(path) for path in root.rglob("*.tw-pddl")}


def play(game: Game, commands: list[str], release: str) -> list[tuple[str, list[str], bool]]:
    """The opening, then what every command is answered: observation, admissible commands, won."""
    world, texts, grammar = World(game.scene), ReleaseTexts(release), ReleaseGrammar(release)
    told = [(texts.opening(game, world), grammar.spell(world.admissible()), game.goal.is_met(world))]
    for text in commands:
        command = grammar.parse(text)
        if command is not None and not world.apply(command):
            command = None
        reply = texts.reply(game, world, command)
        told.append((reply, grammar.spell(world.admissible()), game.goal.is_met(world)))
    return told


def test_no_step_of_any_trace_differs(games: dict[str, Game]) -> None:
    with gzip.open(find_shared("alfworld", "textworld_traces_dev.json.gz")) as file:
        traces = json.load(file)
    steps = 0
    for trace in traces:
        told = play(games[trace["id"]], [step["cmd"] for step in trace["steps"]], "2.1.2")
        expected = [(trace["first_obs"], trace["first_admissible"], False)]
        expected += [(step["obs"], step["admissible"], step["won"]) for step in trace["steps"]]
        assert told == expected, trace["id"]
        steps += len(trace["steps"])
    assert (len(traces), steps) == (28, 654)


def test_the_older_release_differs_by_the_three_rules_alone(games: dict[str, Game]) -> None:
    """What a trace says in 2.1.2, rewritten by hand, is what 2.1.1 says."""
    with gzip.open(find_shared("alfworld", "textworld_traces_dev.json.gz")) as file:
        traces = json.load(file)
    for trace in traces:
        game = games[trace["id"]]
        steps = [step for step in trace["steps"] if step["cmd"] != "help"]
        commands = [_as_old(step["cmd"]) for step in steps]
        told = play(game, commands, "2.1.1")[1:]
        for step, command, (reply, admissible, won) in zip(steps, commands, told, strict=True):
            expected = step["obs"]
            if expected.startswith("You arrive at "):
                place = game.scene.location_of[command.removeprefix("go to ")]
                assert place.startswith("loc ")
                expected = f"You arrive at {place}." + expected.partition(".")[2]
            if expected.startswith("You move the "):
                thing, _, receptacle = expected[len("You move the ") : -1].partition(" to the ")
                expected = f"You put the {thing} in/on the {receptacle}."
            assert (reply, won) == (expected, step["won"])
            assert admissible == sorted(_as_old(text) for text in step["admissible"] if text != "help")


def _as_old(command: str) -> str:
    if not command.startswith("move "):
        return command
    thing, _, receptacle = command[len("move ") :].partition(" to ")
    return f"put {thing} in/on {receptacle}"


def test_panels_hold_every_game_once_and_nothing_is_left_out(data: Path, index: dict[str, dict]) -> None:
    panels = OfficialPanels(data)
    assert panels.skipped == []
    counts = Counter(row["split"] for row in index.values())
    assert {split: panels.num_tasks(split) for split in panels.list_splits()} == counts
    assert panels.list_splits() == ["valid_train", "valid_seen", "valid_unseen"]
    for split, count in counts.items():
        tasks = [panels.describe(split, position) for position in range(count)]
        assert {task["id"]: task["task"] for task in tasks} == {
            name: row["task"] for name, row in index.items() if row["split"] == split
        }
        assert len({task["content_hash"] for task in tasks}) == count
        # A panel's beginning is no run of one task family, as the folders' order would be.
        assert len({task["group"] for task in tasks[:20]}) >= 4


# Changing it means that "the first 128 games" are other games.
PANEL = "8ca34052d040982d1077f2b7557faf7aa32c32abf914bb04e6df172e3d642c1b"


def test_the_order_of_a_panel_does_not_depend_on_where_the_data_lie(data: Path) -> None:
    assert OfficialPanels(data).panel_hash("valid_seen") == PANEL
    assert OfficialPanels(data / "json_2.1.1").panel_hash("valid_seen") == PANEL


def test_recorded_plans_win(games: dict[str, Game], index: dict[str, dict]) -> None:
    for name, row in index.items():
        won = [won for _, _, won in play(games[name], row["oracle_plan_2_1_2"], "2.1.2")]
        # A few are won before their plan ends: a thing that lies in two receptacles still lies in the wanted
        # one while it is carried about. (TextWorld agrees.)
        assert won[-1] and not any(won[:3]), name


@pytest.mark.parametrize("release", ["2.1.1", "2.1.2"])
def test_the_solver_wins_every_game(data: Path, release: str, index: dict[str, dict]) -> None:
    env = AlfworldEnv(data=str(data), release=release, win_reward=10)
    turns = []
    for split in env.list_splits():
        for position in range(env.num_tasks(split)):
            _, info = env.reset(split=split, index=position)
            reward, count = 0.0, 0
            while not info["won"]:
                action = env.expert_action()
                assert action in info["admissible"]
                _, reward, _, truncated, info = env.step(action)
                assert not truncated
                count += 1
            assert reward == 10
            turns.append(count)
    recorded = [len(row["oracle_plan_2_1_2"]) for row in index.values()]
    assert len(turns) == len(recorded) and sum(turns) <= sum(recorded)


def test_the_search_expert_wins_nearly_all_without_knowing_where_things_are(games: dict[str, Game]) -> None:
    grammar, wins = ReleaseGrammar(), 0
    for game in games.values():
        world = World(game.scene)
        for _ in range(50):
            command = grammar.parse(expert.choose_command(world, game.goal))
            assert command is not None and world.apply(command)
            if game.goal.is_met(world):
                wins += 1
                break
    assert wins >= 0.95 * len(games)


def test_the_solver_goes_on_from_a_lost_episode(games: dict[str, Game]) -> None:
    """Some games hold things that fit nowhere once they are taken; then it looks around."""
    grammar = ReleaseGrammar()
    for game in games.values():
        rolls = [
            (thing, receptacle)
            for receptacle, things in game.scene.start.items()
            for thing in things
            if thing in game.scene.pickupable
            and not any((kind, game.scene.class_of[thing]) in game.scene.fits for kind in _kinds(game))
        ]
        for thing, receptacle in rolls:
            world = World(game.scene)
            for text in (f"go to {receptacle}", f"open {receptacle}", f"take {thing} from {receptacle}"):
                command = grammar.parse(text)
                assert command is not None
                world.apply(command)
            assert world.holding == thing
            assert solver.choose_command(world, game.goal) == "look"


def _kinds(game: Game) -> set[str]:
    return {game.scene.class_of[receptacle] for receptacle in game.scene.start}


def test_unknown_splits_and_indices_are_named(data: Path) -> None:
    env = AlfworldEnv(data=str(data))
    with pytest.raises(ValueError, match=r"unknown split 'test'.*valid_train, valid_seen, valid_unseen"):
        env.num_tasks("test")
    with pytest.raises(IndexError, match=r"task index 72 of split 'valid_seen' is outside \[0, 72\)"):
        env.reset(split="valid_seen", index=72)
