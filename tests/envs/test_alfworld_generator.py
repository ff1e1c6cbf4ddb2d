"""Generated games: official format, disjoint panels, never won at the start, always winnable; prompts."""

import random
import re
from pathlib import Path

import pytest

from empg_envs import ENVS
from empg_envs.alfworld.env import AlfworldEnv
from empg_envs.alfworld.files import OfficialPanels
from empg_envs.alfworld.formal import make_domain
from empg_envs.alfworld.generator import GeneratedPanels
from empg_envs.alfworld.prompt import make_parser, make_prompts, phrases
from empg_envs.alfworld.rooms import PRESETS
from empg_envs.alfworld.writer import TASK_TYPES, make_content, write_game
from empg_envs.household.env import HouseholdEnv
from empg_envs.household.solver import choose_command
from empg_envs.household.tables import LEVELS
from empg_envs.household.world import World

# Changing any of these means that every published number belongs to other tasks.
PANEL_HASHES = {
    ("tiny", "valid"): "7036d259156883d15fa0c0b6931a86d5006f8f655731a28c1f68553c24f4c9fc",
    ("rooms", "valid"): "86e516e2f44bbc72b32d2d56945db43d5f4e261d1c88420063d6da0e9444bc2a",
}


@pytest.mark.parametrize(("level", "split"), PANEL_HASHES)
def test_panels_never_change(level: str, split: str) -> None:
    assert GeneratedPanels(level).panel_hash(split) == PANEL_HASHES[level, split]


@pytest.mark.parametrize("level", PRESETS)
def test_panels_are_disjoint_and_every_game_is_won_by_the_solver_only_after_its_start(level: str) -> None:
    env, seen, families = AlfworldEnv(source="generated", level=level), set(), set()
    for split in env.list_splits():
        for index in range(60):
            seen.add(env.get_task(split, index)["content_hash"])
            _, info = env.reset(split=split, index=index)
            assert env._game is not None and not env._game.goal.is_met(World(env._game.scene))
            families.add(info["group"])
            while not info["won"]:
                action = env.expert_action()
                assert action in info["admissible"]
                _, _, _, truncated, info = env.step(action)
                assert not truncated
    assert len(seen) == 3 * 60
    assert families == {family for preset in PRESETS[level] for family, _ in preset.families}


def test_the_tiny_level_is_what_its_configuration_says() -> None:
    env = AlfworldEnv(source="generated", level="tiny", max_turns=12)
    for index in range(30):
        task = env.get_task("train", index)
        assert task["group"] == "pick" and len(task["contents"]) <= 8
    rng, wins = random.Random(1), 0
    for index in range(300):
        _, info = env.reset(split="train", index=index)
        is_done = False
        while not is_done:
            _, _, terminated, truncated, info = env.step(rng.choice(info["admissible"]))
            is_done = terminated or truncated
        wins += info["won"]
    assert wins < 10


def test_a_game_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    panels = GeneratedPanels("rooms")
    for index in range(24):
        write_game(panels.make("train", index), tmp_path, "train", f"trial_{index}")
    read, families = OfficialPanels(tmp_path), set()
    assert read.num_tasks("train") == 24 and not read.skipped
    assert not list(tmp_path.rglob("*.tmp"))
    for position in range(24):
        task = read.describe("train", position)
        index = int(task["id"].rpartition("_")[2])
        assert read.load("train", position) == panels.load("train", index)
        families.add(task["group"])
        names = (TASK_TYPES[task["group"]], task["thing"].capitalize(), "None", task["target"].capitalize())
        assert task["id"].split("/")[1] == "-".join((*names, "generated"))
        assert task["task"] == panels.make("train", index).task
    assert families == TASK_TYPES.keys()


def test_what_is_written_declares_everything_that_domain_and_problem_use() -> None:
    content = make_content(GeneratedPanels("kitchen").make("train", 0))
    assert set(content) == {"pddl_domain", "grammar", "pddl_problem", "solvable"}
    objects, _, rest = content["pddl_problem"].partition("(:init")
    declared = set(re.findall(r"(\S+) - ", objects))
    used = set(re.findall(r"[^\s()]+", re.sub(r"\((\S+)", "(", rest.partition("(:goal")[0])))
    assert used <= declared
    assert set(re.findall(r"\b\w+Type\b", make_domain())) - {"receptacleType", "objectType"} <= declared
    for text in content.values():
        assert not isinstance(text, str) or (text.isascii() and text.count("(") == text.count(")"))


@pytest.mark.parametrize("level", LEVELS)
def test_the_solver_wins_the_household_sooner_than_the_search(level: str) -> None:
    env = HouseholdEnv(level)
    informed = searched = 0
    for index in range(40):
        _, info = env.reset(split="train", index=index)
        while not info["won"]:
            _, _, _, truncated, info = env.step(env.expert_action())
            assert not truncated
            searched += 1
        _, info = env.reset(split="train", index=index)
        while not info["won"]:
            assert env._world is not None and env._game is not None
            _, _, _, truncated, info = env.step(choose_command(env._world, env._game.goal))
            assert not truncated
            informed += 1
    assert informed < searched


INFO = {"task": "put a mug in desk.", "admissible": ["go to desk 1", "help", "look"], "won": False}


def test_prompts_by_verl_agents_conventions() -> None:
    prompts = make_prompts()
    opening = "You are in the middle of a room.\n\nYour task is to: put a mug in desk."
    (first,) = prompts.start(opening, INFO)
    assert prompts.window([], opening, INFO, 0) == [first]
    assert opening in first["content"] and "['go to desk 1'\n 'look']" in first["content"]
    (later,) = prompts.window([("o4", "a4"), ("o5", "a5")], "o6", INFO, 5)
    assert "Your task is to: put a mug in desk." in later["content"]
    assert "[Observation 4: 'o4', Action 4: 'a4']\n[Observation 5: 'o5', Action 5: 'a5']" in later["content"]
    for prompt in (first, later):
        assert all(tag in prompt["content"] for tag in ("<think>", "</think>", "<action>", "</action>"))
        assert "ALFRED" in prompt["content"] and "'help'" not in prompt["content"]


@pytest.mark.parametrize(
    ("response", "action", "is_valid"),
    [
        ("Go to  desk 1\nbecause", "go to desk 1", True),
        ("put mug 1 in/on desk 1", "put mug 1 in/on desk 1", True),
        ("move mug 1 to desk 1", "move mug 1 to desk 1", True),
        ("put mug 1 into desk 1", "put mug 1 into desk 1", False),
        ("", "", False),
    ],
)
def test_line_parser(response: str, action: str, is_valid: bool) -> None:
    parsed = make_parser("line", style="compact")(response, INFO)
    assert (parsed.action, parsed.is_valid) == (action, is_valid)


def test_compact_prompts_end_with_the_task_and_their_vocabulary_covers_everything() -> None:
    prompts = make_prompts("compact", parser="line")
    assert prompts.follow("Nothing happens.", INFO) == "Nothing happens. Your task is to: put a mug in desk."
    messages = prompts.window([("o4", "a4")], "o5", INFO, 5)
    assert [message["content"] for message in messages] == ["o4", "a4", f"o5 Your task is to: {INFO['task']}"]
    for level in ("tiny", "rooms"):
        vocabulary = phrases(level, source="generated", max_turns=12)
        assert vocabulary == sorted(set(vocabulary))
        known = sorted(map(re.escape, [*vocabulary, ".", ",", ":"]), key=len, reverse=True)
        pattern = re.compile(rf"\s*(?:{'|'.join(known)})(?!\w)|\s*(?:{'|'.join(known)})$")
        env, rng = AlfworldEnv(source="generated", level=level, expert="search"), random.Random(2)
        for index in range(25):
            observation, info = env.reset(split="valid", index=index)
            texts, is_done = [prompts.start(observation, info)[0]["content"]], False
            while not is_done:
                action = env.expert_action() if rng.random() < 0.6 else rng.choice(info["admissible"])
                observation, _, terminated, truncated, info = env.step(action)
                texts += [action, prompts.follow(observation, info)]
                is_done = terminated or truncated
            for text in texts:
                position = 0
                while position < len(text):
                    match = pattern.match(text, position)
                    assert match is not None, text[position:]
                    position = match.end()


def test_unknown_options_are_named() -> None:
    with pytest.raises(ValueError, match="prompt style 'terse'; the choices are verl, compact"):
        make_prompts("terse")
    with pytest.raises(ValueError, match="unknown alfworld parser 'plain'"):
        make_parser("plain")
    with pytest.raises(ValueError, match="only generated games"):
        phrases("tiny")
    spec = ENVS["alfworld"]
    assert spec.phrases is not None and spec.phrases(level="tiny", source="generated") == phrases(
        "tiny", source="generated"
    )
