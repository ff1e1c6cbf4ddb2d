"""Embedded Deep Search worlds: two searches are needed, the expert finds them, one search does not."""

import re

import pytest

from empg_envs import make_env
from empg_envs.deepsearch.env import DeepSearchEnv
from empg_envs.deepsearch.passages import STOP_WORDS, words_of
from empg_envs.deepsearch.prompt import phrases
from empg_envs.deepsearch.tables import KIND_OF_VALUE, LEVELS, NAMES, RELATIONS
from empg_envs.deepsearch.tags import read_call
from empg_envs.deepsearch.worlds import make_puzzle, paths
from empg_jax.text.builtin import build_phrase_tokenizer

SPLITS = ("train", "valid", "test", "test_ood")
every_level = pytest.mark.parametrize("level", list(LEVELS))


def play(env: DeepSearchEnv, split: str, index: int) -> tuple[float, int, list[str]]:
    """An episode by the expert: return, turns, everything said."""
    observation, _ = env.reset(split=split, index=index)
    said, turns, done, reward = [observation], 0, False, 0.0
    while not done:
        action = env.expert_action()
        observation, reward, terminated, truncated, _ = env.step(action)
        said += [action, observation]
        turns, done = turns + 1, terminated or truncated
    return reward, turns, said


def test_names_cannot_be_confused() -> None:
    words = [word for names in NAMES.values() for name in names for word in name.split()]
    assert len(set(words)) == len(words)
    assert not {*KIND_OF_VALUE, *STOP_WORDS} & set(words)
    assert len(KIND_OF_VALUE) == sum(map(len, RELATIONS.values()))


@every_level
@pytest.mark.parametrize("style", ["terse", "search_r1"])
def test_no_query_of_the_questions_words_brings_the_answer(level: str, style: str) -> None:
    env = make_env("deepsearch", level=level, style=style)
    for split in SPLITS:
        for index in range(25):
            task = env.get_task(split, index)
            asked = set(words_of(task["question"])) - set(KIND_OF_VALUE)
            answer = set(words_of(task["golden_answers"][0]))
            found = [set(words_of(passage["contents"])) for passage in task["passages"]]
            assert len(task["passages"]) == LEVELS[level].pages
            assert any(words & asked for words in found)  # the question leads somewhere
            assert not any(words & asked and words & answer for words in found)
            assert sum(bool(words & answer) for words in found) == 1


def test_the_index_of_a_world_finds_by_name_alone() -> None:
    env = make_env("deepsearch", level="tiny", max_turns=20)
    env.reset(split="train", index=0)
    for relation in KIND_OF_VALUE:
        assert env.step(f"<search>{relation} of the</search>")[0].startswith("nothing . question :")


@every_level
@pytest.mark.parametrize(("style", "snippet_words"), [("terse", None), ("search_r1", 5)])
def test_the_expert_always_wins(level: str, style: str, snippet_words: int | None) -> None:
    env = make_env("deepsearch", level=level, style=style, snippet_words=snippet_words, max_turns=12)
    for split in SPLITS:
        for index in range(15):
            reward, turns, _ = play(env, split, index)
            hops = env.get_task(split, index)["metadata"]["hops"]
            assert reward == 1.0 and turns > hops >= 2
            if snippet_words is None:
                assert turns == hops + 1


@pytest.mark.parametrize("query", ["start", "question", "every name"])
def test_one_search_is_not_enough(query: str) -> None:
    """Policies that know the whole grammar and read everything, but search once."""
    env = make_env("deepsearch", level="tiny")
    won = 0
    for index in range(200):
        _, info = env.reset(split="test", index=index)
        task = env.get_task("test", index)
        names = " ".join(name for kind in NAMES.values() for name in kind)
        start = task["metadata"]["supporting_titles"][0]
        words = {"start": start, "question": info["task"], "every name": names}[query]
        results = env.step(f"<search>{words}</search>")[0]
        wanted = info["task"].split()[0]  # the last relation
        told = results.split(" question")[0].partition(f"{wanted} ")[2]
        guess = re.split(r" [.,]", told)[0] or NAMES["person"][0]
        won += env.step(f"<answer>{guess}</answer>")[1] == 1.0
    assert won < 100


def test_noise_does_not_stop_the_expert() -> None:
    env = make_env("deepsearch", level="medium", max_turns=40)
    for index in range(20):
        _, info = env.reset(split="train", index=index)
        for turn in range(10):
            listed = info["admissible"]
            assert all(read_call(action).tool == "search" for action in listed)
            info = env.step(listed[(3 * turn + index) % len(listed)])[4]
        done = False
        while not done:
            _, reward, done, truncated, info = env.step(env.expert_action())
            assert not truncated
        assert reward == 1.0 and info["won"]


def test_panels_keep_domains_apart() -> None:
    level = LEVELS["medium"]
    seen = {split: {make_puzzle(level, split, index).relations for index in range(60)} for split in SPLITS}
    assert seen["train"] & seen["test"]
    assert not seen["test_ood"] & (seen["train"] | seen["valid"] | seen["test"])
    assert not {path for _, path in paths(2, True)} & {path for _, path in paths(2, False)}
    env = make_env("deepsearch")
    task = env.get_task("test_ood", 0)
    assert (
        task["group"] == f"{task['metadata']['hops']}-hop" == env.reset(split="test_ood", index=0)[1]["group"]
    )
    other = make_env("deepsearch", style="search_r1")
    assert env.panel_hash("valid") == other.panel_hash("valid") != env.panel_hash("test_ood")


@every_level
def test_the_vocabulary_is_closed(level: str) -> None:
    for snippet_words in (None, 4):
        options = {"level": level, "snippet_words": snippet_words}
        tokenizer = build_phrase_tokenizer(phrases(**options))
        env = make_env("deepsearch", **options, max_turns=20, tool_budget=6)
        for split in SPLITS:
            for index in range(10):
                said = play(env, split, index)[2]
                env.reset(split=split, index=index)
                odd = ("x", "<search>x</search>", "<open>99</open>", *["<search>acme</search>"] * 7)
                said += [env.step(action)[0] for action in odd]
                for text in said:
                    decoded = tokenizer.decode(tokenizer.encode(text))
                    assert "<|unk|>" not in decoded
                    assert decoded.replace(" ", "") == text.replace(" ", "")


def test_a_vocabulary_needs_an_embedded_terse_world() -> None:
    with pytest.raises(ValueError, match="closed vocabulary"):
        phrases(style="search_r1")
    with pytest.raises(ValueError, match="closed vocabulary"):
        phrases(questions="some.jsonl")
    with pytest.raises(ValueError, match="unknown deepsearch level 'tinny'; did you mean 'tiny'"):
        phrases("tinny")
