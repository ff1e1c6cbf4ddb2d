"""Generated shops, styles, experts, prompts and hostile actions."""

import itertools
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empg_envs import ENVS
from empg_envs.webshop import assortment
from empg_envs.webshop.embedded import LEVELS, load_shop
from empg_envs.webshop.env import WebShopEnv
from empg_envs.webshop.prompt import (
    MAX_PROMPT_CHARACTERS,
    make_parser,
    make_prompts,
    offered_actions,
    phrases,
    quote_page,
)
from empg_envs.webshop.reward import _count_options as count_options
from empg_envs.webshop.shop import Page

PANELS = {  # number of goals, and the first characters of the hash of the panel's first goal
    "tiny": {"train": (1494, "00de6d60"), "valid": (216, "00908f2a"), "test": (549, "008781d6")},
    "standard": {"train": (5340, "0012531e"), "valid": (696, "000f4bdc"), "test": (684, "0106d094")},
}


def play(
    env: WebShopEnv, split: str, index: int, noise: float = 0.0, seed: int = 0
) -> tuple[float, int, dict]:
    """Return, turns and last info of an episode of the expert with some random turns."""
    rng = random.Random(seed)
    _, info = env.reset(split=split, index=index)
    total, turns, is_done = 0.0, 0, False
    while not is_done:
        action = rng.choice(info["admissible"]) if rng.random() < noise else env.expert_action()
        _, reward, terminated, truncated, info = env.step(action)
        total, turns, is_done = total + reward, turns + 1, terminated or truncated
    return total, turns, info


@pytest.mark.parametrize("level", LEVELS)
def test_shops_are_what_they_were(level: str) -> None:
    """The same goals in the same order on every machine: a change here changes published numbers."""
    shop = load_shop(level)
    found = {}
    for split, panel in shop.panels.items():
        found[split] = len(panel), shop.store.goal(panel[0]).content_hash()[:8]
    assert found == PANELS[level]


def test_the_standard_shop_is_large_and_varied() -> None:
    shop = load_shop("standard")
    goals = [shop.store.goal(n) for n in range(0, shop.store.num_goals, 5)]
    assert shop.store.meta["products"] >= 1000
    assert len({goal.instruction for goal in goals}) == len(goals)
    assert len({goal.instruction.split()[0] for goal in goals}) >= 7
    titles = {shop.store.product(goal.asin).title for goal in goals}
    assert len(titles) > 0.95 * len({goal.asin for goal in goals})
    for goal in goals:
        product = shop.store.product(goal.asin)
        assert goal.price_upper > shop.store.price(goal.asin) and len(product.asin) == 10
        assert all(any(value in values for values in product.options.values()) for value in goal.options)


def test_values_of_an_option_are_told_apart_by_the_reward() -> None:
    pools = [values for department in assortment.DEPARTMENTS for values in department.options.values()]
    for pool in [*pools, assortment.TINY_COLORS, assortment.TINY_SIZES]:
        for chosen, wanted in itertools.permutations(pool, 2):
            assert count_options((chosen,), (wanted,)) == 0, (chosen, wanted)


@pytest.mark.parametrize("level", LEVELS)
def test_splits_ask_for_different_products(level: str) -> None:
    shop = load_shop(level)
    asked = {split: {shop.store.goal(n).asin for n in panel} for split, panel in shop.panels.items()}
    assert all(asked.values())
    assert not any(asked[a] & asked[b] for a, b in itertools.combinations(asked, 2))


@pytest.mark.parametrize("style", ["terse", "page"])
@pytest.mark.parametrize("level", LEVELS)
def test_the_expert_scores_one_on_every_goal_tried(level: str, style: str) -> None:
    env = WebShopEnv(level=level, style=style)
    for split in env.list_splits():
        count = env.num_tasks(split)
        for index in range(0, count, max(count // 60, 1)):
            total, turns, info = play(env, split, index)
            assert total == info["metrics"]["task_score"] == 1.0 and info["won"] and turns <= 7


def test_the_expert_recovers_from_random_turns() -> None:
    env = WebShopEnv(level="tiny", max_turns=200)
    results = [play(env, "train", index, noise=0.3, seed=index) for index in range(60)]
    for total, _, info in results:
        assert (total == 1.0) == info["won"]
    assert sum(info["won"] for *_, info in results) > 30  # the others bought something at random


def test_a_random_policy_hardly_ever_wins_tiny() -> None:
    env = WebShopEnv(level="tiny")
    assert sum(play(env, "train", index, noise=1.0, seed=index)[2]["won"] for index in range(300)) < 6


def test_the_rule_based_shopper_reads_only_what_is_shown() -> None:
    env = WebShopEnv(level="standard", expert="rules")
    scores = [play(env, "test", index)[0] for index in range(0, 600, 10)]
    assert 0.7 < sum(scores) / len(scores) < 1.0
    env.reset(split="test", index=0)
    visit = env._visit
    assert visit is not None
    visit.search("zinc")
    assert visit.page is Page.RESULTS and not visit.shown
    assert env.expert_action().startswith("search[")


def test_rewards_and_limits() -> None:
    winning = WebShopEnv(level="tiny", win_reward=10.0)
    assert play(winning, "test", 0)[0] == 10.0
    winning.reset(split="test", index=0)
    while winning.expert_action() != "buy" or winning._visit.chosen:  # type: ignore[union-attr]
        action = winning.expert_action()
        if action.startswith("pick"):
            break
        winning.step(action)
    _, reward, terminated, truncated, info = winning.step("buy")
    assert (reward, terminated, truncated, info["won"]) == (0.0, True, False, False)
    assert info["metrics"]["task_score"] == 0.6  # two attributes and the price of five conditions
    assert info["metrics"]["tagger_lexicon"] == 1.0 and info["tagger"] == "lexicon"
    short = WebShopEnv(level="tiny", max_turns=2)
    short.reset(split="test", index=0)
    assert short.step("leave")[2:4] == (False, False)
    assert short.step("leave")[1:4] == (0.0, False, True)


def test_unknown_choices_are_named() -> None:
    for option, message in {
        "level": "tiny, standard, official",
        "style": "terse, page",
        "expert": "goal, rules",
    }.items():
        with pytest.raises(ValueError, match=f"unknown webshop {option} 'x'.*{message}"):
            WebShopEnv(**{option: "x"})
    with pytest.raises(ValueError, match="at least 1"):
        WebShopEnv(max_turns=0)
    official = {"data": "x", "size": "full", "goals": "human", "legacy_panel": True, "worker_seed": 3}
    for option, value in {**official, "fallback": True, "cache_dir": "x"}.items():
        with pytest.raises(ValueError, match=f"option {option}=.* level='official' only"):
            WebShopEnv(**{option: value})
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        load_shop("tinny")


BEGINNINGS = ["search[", "click[", "search ", "open item ", "pick ", "buy", "["]
anything = (
    st.text(max_size=40)
    | st.binary(max_size=40).map(lambda data: data.decode("utf-8", "surrogateescape"))
    | st.binary(max_size=40).map(lambda data: data.decode("latin-1"))
    | st.tuples(
        st.sampled_from(["search[", "click[", "search ", "open item ", "pick ", "buy", "["]),
        st.text(max_size=9),
    )
    .map("".join)
    .flatmap(lambda text: st.sampled_from([text, text + "]", text * 2000, text + "\n]"]))
)


@pytest.mark.parametrize("style", ["terse", "page"])
@settings(max_examples=150, deadline=None)
@given(actions=st.lists(anything | st.just("expert"), min_size=1, max_size=8))
def test_any_bytes_of_any_length_get_a_defined_reply(style: str, actions: list[str]) -> None:
    env = WebShopEnv(level="tiny", style=style, max_turns=9)
    env.reset(split="train", index=3)
    for action in actions:
        text = env.expert_action() if action == "expert" else action
        observation, reward, terminated, truncated, info = env.step(text)
        assert observation and isinstance(observation, str) and 0.0 <= reward <= 1.0 and not truncated
        assert info["admissible"] or terminated
        if terminated:
            break


@pytest.mark.parametrize("style", ["terse", "page"])
def test_endless_actions(style: str) -> None:
    env = WebShopEnv(level="tiny", style=style)
    observation, _ = env.reset(split="train", index=0)
    for action in ("[" * 10**6, "click[" + "x" * 10**6 + "]", "open item " + "9" * 10**6, "pick " * 10**5):
        assert env.step(action)[0] == observation
    words = " ".join(f"w{n}" for n in range(10**5))
    assert env.step(f"search[{words}]" if style == "page" else f"search {words}")[0] != observation


def matcher(vocabulary: list[str]) -> re.Pattern[str]:
    longest_first = sorted(vocabulary, key=len, reverse=True)
    return re.compile("(?:(?:" + "|".join(map(re.escape, longest_first)) + r")(?: |$))*")


def test_phrases_cover_everything_that_the_tiny_shop_says() -> None:
    assert phrases() == sorted(set(phrases())) and len(phrases()) < 160
    pattern, rng = matcher(phrases()), random.Random(5)
    env = WebShopEnv(level="tiny")
    lengths = []
    for index in range(120):
        observation, info = env.reset(split=rng.choice(env.list_splits()), index=index)
        is_done = False
        while not is_done:
            for text in (observation, *info["admissible"], env.expert_action()):
                assert pattern.fullmatch(text), text
            lengths.append(len(observation.split()))
            action = rng.choice(info["admissible"]) if rng.random() < 0.4 else env.expert_action()
            observation, _, terminated, truncated, info = env.step(action)
            is_done = terminated or truncated
        assert pattern.fullmatch(observation), observation
    assert max(lengths) < 36
    for options in ({"level": "standard"}, {"style": "page"}):
        with pytest.raises(ValueError, match="closed vocabulary"):
            phrases(**options)


INFO = {
    "task": "find a lamp",
    "has_search": False,
    "clickables": ["back to search", "< prev", "buy now"],
}
PAGE = "Instruction: [SEP] find a lamp [SEP] Back to Search [SEP] Lamp"


def test_page_prompts() -> None:
    prompts = make_prompts("page", "tags")
    (first,) = prompts.start(PAGE, INFO)
    content = first["content"]
    assert "The request is: find a lamp" in content and "<think>" in content and "<action>" in content
    assert "'Back to Search' [SEP] 'Lamp'" in content and "Instruction:" not in content
    assert "'click[back to search]',\n'click[< prev]',\n'click[buy now]'," in content
    assert prompts.window([], PAGE, INFO, 0) == [first]
    (later,) = prompts.window([(PAGE, "click[a]"), (PAGE, "click[b]")], PAGE, INFO, 5)
    assert "Action 4: 'click[a]'" in later["content"] and "Action 5: 'click[b]'" in later["content"]
    assert "step 6" in later["content"]
    (long,) = prompts.window([(PAGE + "x" * MAX_PROMPT_CHARACTERS, "click[a]")], PAGE, INFO, 5)
    assert long == first
    assert prompts.follow(PAGE, INFO).startswith("The page now: ")
    assert "<think>" not in make_prompts("page").start(PAGE, INFO)[0]["content"]


def test_prompt_parts() -> None:
    assert quote_page("Thank you [SEP] Reward", "find") == "'Thank you' [SEP] 'Reward'"
    assert offered_actions({"has_search": True, "clickables": ["search"]}) == ["search[<your query>]"]
    assert make_prompts().follow("seen", INFO) == "seen"
    with pytest.raises(ValueError, match="needs parser 'plain'"):
        make_prompts("terse", "tags")
    with pytest.raises(ValueError, match="styles are terse, page"):
        make_prompts("long")
    with pytest.raises(ValueError, match="parsers are plain, tags"):
        make_parser("json")


@pytest.mark.parametrize(
    ("options", "response", "action", "is_valid"),
    [
        ({}, "\n Search  red mug \nmore", "search red mug", True),
        ({}, "open item 2", "open item 2", True),
        ({}, "dance", "dance", False),
        ({}, "search", "search", False),
        ({"style": "page"}, "click[Buy Now] please", "click[Buy Now] please", True),
        ({"style": "page"}, "buy now", "buy now", False),
        ({"style": "page"}, "", "", False),
        ({"parser": "tags"}, "<think>a</think><action> Click[Buy Now] </action>", "click[buy now]", True),
        ({"parser": "tags"}, "<action>click[x]</action>", "click[x]", False),
        ({"parser": "tags"}, "<think>\u597d</think><action>click[x]</action>", "click[x]", False),
        ({"parser": "tags"}, "<think>a</think> I would buy it now", "> i would buy it now", False),
    ],
)
def test_parsers(options: dict, response: str, action: str, is_valid: bool) -> None:
    parsed = ENVS["webshop"].parser(**options)(response, INFO)
    assert (parsed.action, parsed.is_valid) == (action, is_valid)
