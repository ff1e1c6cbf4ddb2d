"""Prompts, parsers and the closed vocabulary of the household."""

import random
import re

import pytest

from empg_envs import ENVS
from empg_envs.household import commands
from empg_envs.household.env import HouseholdEnv
from empg_envs.household.prompt import make_parser, make_prompts, phrases

INFO = {"task": "put a mug in desk.", "admissible": ["go to desk 1", "help", "look"], "won": False}


def matcher(vocabulary: list[str]) -> re.Pattern[str]:
    """Longest phrase first; a phrase ends at a space or at the end."""
    longest_first = sorted(vocabulary, key=len, reverse=True)
    return re.compile("(?:" + "|".join(map(re.escape, longest_first)) + r")(?: |$)")


def leftover(pattern: re.Pattern[str], text: str) -> str:
    position = 0
    while position < len(text):
        match = pattern.match(text, position)
        if match is None:
            return text[position:]
        position = match.end()
    return ""


@pytest.mark.parametrize("level", ["tiny", "easy", "hard"])
def test_phrases_cover_everything_that_the_terse_style_says(level: str) -> None:
    vocabulary = phrases(level)
    assert vocabulary == sorted(set(vocabulary))
    pattern = matcher(vocabulary)
    env, prompts, rng = HouseholdEnv(level), make_prompts(list_admissible=True), random.Random(5)
    for index in range(150 if level == "tiny" else 40):
        observation, info = env.reset(split=rng.choice(env.list_splits()), index=index)
        done, texts = False, []
        while not done:
            texts += [observation, prompts.follow(observation, info), *info["admissible"]]
            roll = rng.random()
            action = (
                env.expert_action() if roll < 0.6 else rng.choice(info["admissible"]) if roll < 0.9 else "hm"
            )
            observation, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
        for text in texts:
            assert leftover(pattern, text) == "", text


def test_phrases_cover_every_well_formed_command_of_tiny() -> None:
    pattern = matcher(phrases("tiny"))
    nouns = [phrase for phrase in phrases("tiny") if re.fullmatch(r"[a-z]+ [0-9]+", phrase)]
    assert len(nouns) == 6 + 18 + 1
    texts = [*commands.BARE, *(f"{verb} {noun}" for verb in commands.ONE_NOUN for noun in nouns)]
    texts += [f"{verb} {a} {p} {b}" for verb, p in commands.TWO_NOUNS.items() for a in nouns for b in nouns]
    for text in texts:
        assert commands.parse(text) is not None
        assert leftover(pattern, text) == "", text


def test_tiny_texts_are_short() -> None:
    pattern = matcher(phrases("tiny"))
    env = HouseholdEnv("tiny")
    observations, actions = [], []
    for index in range(100):
        _, info = env.reset(split="train", index=index)
        while not info["won"]:
            action = env.expert_action()
            observation, _, _, _, info = env.step(action)
            observations.append(len(pattern.findall(observation)))
            actions.append(len(pattern.findall(action)))
    assert sum(observations) / len(observations) < 13
    assert max(actions) <= 5


def test_terse_prompt_is_the_observation() -> None:
    prompts = make_prompts()
    assert prompts.start("seen", INFO) == [{"role": "user", "content": "seen"}]
    assert prompts.follow("seen", INFO) == "seen"
    assert prompts.window([("before", "look")], "seen", INFO, 3) == [
        {"role": "user", "content": "before"},
        {"role": "assistant", "content": "look"},
        {"role": "user", "content": "seen"},
    ]
    listing = make_prompts(list_admissible=True)
    assert listing.follow("seen", INFO) == "seen . actions : go to desk 1 , look"
    assert listing.window([("before", "look")], "seen", INFO, 1)[-1]["content"].endswith(", look")


@pytest.mark.parametrize("parser", ["plain", "tags"])
@pytest.mark.parametrize("list_admissible", [False, True])
def test_alfworld_prompts(parser: str, list_admissible: bool) -> None:
    prompts = make_prompts("alfworld", list_admissible, parser)
    (first,) = prompts.start("You see a room.\n\nYour task is to: put a mug in desk.", INFO)
    assert first["role"] == "user"
    assert "Your task is to: put a mug in desk." in first["content"]
    assert ("<action>" in first["content"]) == (parser == "tags")
    assert ("'go to desk 1'\n 'look'" in first["content"]) == list_admissible
    assert "'help'" not in first["content"]
    assert prompts.window([], "o", INFO, 0) == prompts.start("o", INFO)
    (later,) = prompts.window([("o4", "a4"), ("o5", "a5")], "o6", INFO, 5)
    assert "[Observation 4: 'o4', Action 4: 'a4']\n[Observation 5: 'o5', Action 5: 'a5']" in later["content"]
    assert "step 6. Observation: o6" in later["content"]
    assert "Your task is to: put a mug in desk." in later["content"]
    (no_history,) = prompts.window([], "o6", INFO, 5)
    assert "The last" not in no_history["content"]


@pytest.mark.parametrize(
    ("response", "action", "is_valid"),
    [
        ("go to desk 1", "go to desk 1", True),
        ("\n  Go  TO desk 1 \nand then more", "go to desk 1", True),
        ("take a nap", "take a nap", False),
        ("", "", False),
        ("   \n ", "", False),
    ],
)
def test_line_parser(response: str, action: str, is_valid: bool) -> None:
    parsed = make_parser()(response, INFO)
    assert (parsed.action, parsed.is_valid) == (action, is_valid)


@pytest.mark.parametrize(
    ("response", "action", "is_valid"),
    [
        ("<think>hm</think><action> Go to Desk 1 </action>", "go to desk 1", True),
        ("<think>hm</think><action>look</action><action>help</action>", "look", True),
        ("<think>hm</think><ACTION>look</ACTION>", "look", True),
        ("<think>hm</think><action>dance</action>", "dance", True),
        ("<action>look</action>", "look", False),
        ("<think>\u597d</think><action>look</action>", "look", False),
        (
            "<think>hm</think> I think that one should go to desk 1",
            "nk that one should go to desk 1"[-30:],
            False,
        ),
        ("</action><action>look", "", False),
        ("<think>hm</think></action><action>look", "", True),
        ("<THINK>hm</THINK><action>look</action>", "look", False),
        ("<think>hm</think><action>look</action></action>", "look", True),
        ("<think>hm</think><action>look", "<think>hm</think><action>look"[-30:], False),
    ],
)
def test_tag_parser(response: str, action: str, is_valid: bool) -> None:
    parsed = make_parser("tags")(response, INFO)
    assert (parsed.action, parsed.is_valid) == (action, is_valid)


def test_unknown_options_are_named() -> None:
    with pytest.raises(ValueError, match="styles are terse, alfworld"):
        make_prompts("verbose")
    with pytest.raises(ValueError, match="parsers are plain, tags"):
        make_parser("json")
    with pytest.raises(ValueError, match="needs parser 'plain'"):
        make_prompts("terse", parser="tags")
    with pytest.raises(ValueError, match="did you mean 'medium'"):
        phrases("medum")
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        HouseholdEnv("tinny")
    with pytest.raises(ValueError, match="styles are"):
        HouseholdEnv(style="loud")
    with pytest.raises(ValueError, match="at least 1"):
        HouseholdEnv(max_turns=0)


def test_the_table_reaches_prompts_parser_and_phrases() -> None:
    spec = ENVS["household"]
    assert spec.prompts(style="alfworld", parser="tags").start("o", INFO)
    assert spec.parser(parser="tags")("x", INFO).is_valid is False
    assert spec.phrases is not None and spec.phrases() == phrases("tiny")
