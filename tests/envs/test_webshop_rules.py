"""Fuzzy matching, reward, products, goals, actions: the original's rules and their quirks."""

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empg_envs.webshop import goals as goal_rules
from empg_envs.webshop import tagger
from empg_envs.webshop.actions import Action, parse_action
from empg_envs.webshop.fuzzy import token_set_ratio
from empg_envs.webshop.reward import compute_reward
from empg_envs.webshop.schema import BadRow, Goal, Product, goal_from_json, product_from_json, read_product
from empg_envs.webshop.tagger import lexicon_tagger, make_tagger
from tests.shared import find_shared

ROW = {
    "asin": "B000000001",
    "name": "Oak Bar Stool",
    "full_description": "A stool.",
    "small_description": ["easy clean legs", "made of oak"],
    "pricing": "$19.99",
    "product_category": "Home \u203a Furniture \u203a Stools",
    "category": "garden",
    "query": " Bar Stools ",
    "customization_options": {"Size": [{"value": " Large/Tall "}, {"value": "Small"}], "Unused": None},
}
PRODUCT = read_product(ROW, {"attributes": ["easy clean", "solid wood"]})
TOKENS = make_tagger("tokens")


def make_goal(**changes: object) -> Goal:
    fields = {
        "asin": PRODUCT.asin,
        "instruction": "i want a stool",
        "attributes": ("easy clean",),
        "price_upper": 30.0,
        "options": (),
        "title": PRODUCT.title,
        "query": PRODUCT.query,
        "product_category": PRODUCT.product_category,
    }
    return Goal(**(fields | changes))


def make_product(**changes: object) -> Product:
    return read_product(ROW | changes, {"attributes": ["easy clean", "solid wood"]})


def score(goal: Goal, bought: Product = PRODUCT, price: float = 19.99, chosen: tuple[str, ...] = ()) -> float:
    return compute_reward(goal, bought, price, chosen, TOKENS).total


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [  # as thefuzz 0.22.1 with RapidFuzz 3.14 gives them
        ("easy clean", "easy to clean", 100),
        ("long sleeve", "short sleeve", 71),
        ("x-large", ("size", "3x-large"), 83),
        ("x-large", ("size", "xx-large"), 83),
        ("large", ("size", "x-large"), 100),
        ("", "a", 0),
        ("★", "a", 0),
        ("Crème brûlée", "creme brulee", 86),
        ("c-blue", "d-black", 46),
        ("machine wash", "machine washable", 86),
        ("abcd", "dcba", 25),
        ("10 inch", "12 inch", 86),
        (("color", "red"), "red", 100),
        ("fl.oz", "fl oz", 100),
        ("a_b", "a b", 100),
        ("gluten free", "free gluten snacks", 100),
    ],
)
def test_token_set_ratio(first: object, second: object, expected: int) -> None:
    assert token_set_ratio(first, second) == token_set_ratio(second, first) == expected


@settings(deadline=None)
@given(
    left=st.lists(st.sampled_from(["red", "reed", "oak", "x1"]), max_size=4),
    extra=st.sampled_from(["", "zinc", "ree"]),
)
def test_order_and_repetition_of_words_do_not_matter(left: list[str], extra: str) -> None:
    first, second = " ".join(left), " ".join(sorted({*left, extra}))
    value = token_set_ratio(first, second)
    assert value == token_set_ratio(" ".join(reversed(left + left)), second)
    assert value == (100 if left else 0)


def test_reward_of_a_perfect_purchase_and_of_each_miss() -> None:
    goal = make_goal(attributes=("easy clean", "solid wood"), options=("large | tall",))
    assert score(goal, chosen=("large | tall",)) == 1.0
    assert score(goal) == 3 / 4
    assert score(goal, chosen=("small",)) == 3 / 4
    assert score(goal, chosen=("large | tall",), price=31.0) == 3 / 4
    assert score(make_goal(attributes=("easy clean", "waterproof")), chosen=()) == 2 / 3


def test_attributes_are_also_found_in_texts() -> None:
    for text in ("oak bar", "made of oak", "a stool"):
        assert score(make_goal(attributes=(text,))) == 1.0
    assert score(make_goal(attributes=("legs made of",))) == 1.0  # bullets are joined by a space
    assert score(make_goal(attributes=("steel frame",))) == 0.5


def test_type_factor() -> None:
    other = {"query": "lamps", "product_category": "Light"}
    stranger = make_product(name="Glass Lamp", **other)
    assert score(make_goal(attributes=("easy clean",)), stranger) == 0.0  # no common noun
    one_of_three = make_product(name="Stool", **other)
    assert score(make_goal(), one_of_three) == 1.0  # a third of the nouns is enough
    goal = make_goal(title="one two three four five stool")
    assert score(goal, one_of_three) == 0.5  # a sixth is not, when query and categories differ
    assert score(goal, make_product(name="Stool", query="BAR STOOLS ", product_category="x")) == 1.0
    assert (
        score(goal, make_product(name="Stool", query="x", product_category="Home \u203a Stools \u203a x"))
        == 1.0
    )
    assert score(goal, make_product(name="Stool", query="x", product_category="Home \u203a x")) == 0.5
    many = make_goal(title=" ".join(f"w{n}" for n in range(10)) + " stool")
    assert score(many, make_product(name="Stool")) == pytest.approx(0.1)  # same query, but 1 noun of 11
    assert score(make_goal(title="", query="x", product_category="x")) == 0.5  # no nouns count as 0.2


def test_options_quirks_of_the_original() -> None:
    pairs = make_goal(options=(("size", "3x-large"), ("color", "dark blue")))
    assert score(pairs, chosen=("large", "blue")) == 1.0  # part of the printed pair
    assert score(pairs, chosen=("small", "navy")) == 0.5
    plain = make_goal(options=("navy blue",))
    assert score(plain, chosen=("sky blue",)) == 1.0  # both are "blue", the first color word in the table
    assert score(plain, chosen=("navy",)) == 2 / 3


def test_taggers() -> None:
    assert TOKENS.nouns("Men's Oak, oak!") == ("men", "'", "s", "oak", ",", "oak", "!")
    assert lexicon_tagger(["oak"]).nouns("Fine Oak oak") == ("oak", "oak")
    with pytest.raises(ValueError, match="taggers are auto, spacy, tokens"):
        make_tagger("nltk")


def test_the_spacy_tagger_is_chosen_where_a_model_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Token(NamedTuple):
        text: str
        pos_: str

    class Spacy:
        @staticmethod
        def load(model: str) -> Callable[[str], list[Token]]:
            return lambda title: [Token(w, "PROPN" if w.istitle() else "ADJ") for w in title.split()]

    installed = {"spacy", "en_core_web_md"}
    monkeypatch.setattr(tagger.importlib.util, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(tagger.importlib, "import_module", lambda name: Spacy)
    tagger._spacy_tagger.cache_clear()
    for name in ("auto", "spacy"):
        chosen = make_tagger(name)
        assert (chosen.name, chosen.nouns("fine Oak Stool")) == ("spacy:en_core_web_md", ("oak", "stool"))
    installed.clear()
    assert make_tagger("auto").name == "tokens"
    with pytest.raises(ValueError, match="none is installed"):
        make_tagger("spacy")


def test_product_by_the_official_rules() -> None:
    assert PRODUCT.options == {"size": ("large | tall", "small")}
    assert (PRODUCT.query, PRODUCT.price_tag, PRODUCT.prices) == ("bar stools", "$19.99", (19.99,))
    assert PRODUCT.search_text() == "oak bar stool a stool. easy clean legs size: large | tall, small"
    assert product_from_json(PRODUCT.to_json()) == PRODUCT
    assert read_product(ROW, None).attributes == ("DUMMY_ATTR",)
    priced = {"": ((100.0,), "$100.0"), "$1,299.50": ((1299.5,), "$1299.5")}
    priced["$5 - $9.5 $12"] = ((5.0, 9.5), "$5.0 to $9.5")
    for pricing, (prices, tag) in priced.items():
        product = make_product(pricing=pricing)
        assert (product.prices, product.price_tag) == (prices, tag)
    assert make_product(small_description="one", customization_options="").bullets == ("one",)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"asin": None}, "'asin'"),
        ({"asin": "B" * 11}, "1 to 10 characters"),
        ({"name": None}, "'name'"),
        ({"query": 3}, "'query'"),
        ({"small_description": None}, "'small_description'"),
        ({"pricing": "free"}, "'pricing'"),
        ({"pricing": "$"}, "'pricing'"),
        ({"customization_options": {"size": ["large"]}}, "option 'size'"),
        ({"customization_options": [1]}, "'customization_options'"),
    ],
)
def test_a_bad_row_says_which_field(change: dict, named: str) -> None:
    with pytest.raises(BadRow, match=named):
        read_product(ROW | change, None)
    with pytest.raises(BadRow, match="object, not list"):
        read_product([], None)
    with pytest.raises(BadRow, match="'attributes'"):
        read_product(ROW, {"attributes": "easy clean"})


def test_synthetic_goals() -> None:
    entry = {"instruction": "Find me stools", "instruction_attributes": ["easy clean"]}
    first, second = goal_rules.synthetic_goals(PRODUCT, entry, 19.99, random.Random(0))
    limit = max(random.Random(0).sample([20.0, 30.0, 40.0, 50.0], 2))
    assert (
        first.instruction
        == f"Find me stools with size: large | tall, and price lower than {limit:.2f} dollars"
    )
    assert first.options == (("size", "large | tall"),) and second.options == (("size", "small"),)
    assert first.price_upper == second.price_upper == limit
    assert goal_from_json(first.to_json()) == first
    rng = random.Random(0)
    assert list(goal_rules.synthetic_goals(PRODUCT, {}, 19.99, rng)) == []
    assert rng.random() == random.Random(0).random()  # nothing was drawn
    with pytest.raises(BadRow, match="instruction_attributes"):
        list(goal_rules.synthetic_goals(PRODUCT, entry | {"instruction_attributes": []}, 1.0, rng))
    (dear,) = goal_rules.synthetic_goals(make_product(customization_options={}), entry, 985.0, rng)
    assert dear.price_upper == 1_000_000 and dear.instruction == "Find me stools"
    assert goal_rules.synthetic_weight(["a", "b"], Counter(a=1, b=4)) == 0.625


def test_human_goals() -> None:
    entry = {
        "instruction": "i want a stool.",
        "instruction_attributes": ["oak"],
        "instruction_options": ["small"],
    }
    (goal,) = goal_rules.human_goals(
        PRODUCT, [entry, entry | {"instruction_attributes": []}], 19.99, random.Random(0)
    )
    assert goal.instruction.startswith("i want a stool, and price lower than ")
    assert goal.options == ("small",) and goal.weight == 1.0
    with pytest.raises(BadRow, match="instruction_options"):
        list(goal_rules.human_goals(PRODUCT, [entry | {"instruction_options": None}], 1.0, random.Random(0)))


def test_prices_are_drawn_from_ranges_only() -> None:
    rng = random.Random(goal_rules.PRICE_SEED)
    assert goal_rules.draw_price(PRODUCT, rng) == 19.99
    drawn = goal_rules.draw_price(make_product(pricing="$5 $9"), rng)
    assert drawn == random.Random(42).uniform(5.0, 9.0)


def original_parse(text: str) -> Action:
    match = re.match(r"(.+)\[(.+)\]", text)
    if match is None or match[1] not in ("search", "click"):
        return Action("")
    return Action(match[1], match[2].lower())


@settings(max_examples=500, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("[]a\nsearchclick İ"), max_size=12) | st.text(max_size=8))
def test_actions_are_read_as_by_the_original_expression(text: str) -> None:
    for variant in (text, f"search[{text}", f"click[{text}]", f"search{text}]", f"search[{text}]x"):
        assert parse_action(variant) == original_parse(variant)


def test_endless_actions_are_read_at_once() -> None:
    assert parse_action("[" * 1_000_000) == Action("")
    assert parse_action("search[" + "]" * 1_000_000).name == "search"


@pytest.mark.shared_data
def test_rewards_of_the_original() -> None:
    folder = find_shared("webshop")
    products = official_products()
    prices = json.loads((folder / "product_prices_seed42.json").read_text())
    with gzip.open(folder / "goals_dev.jsonl.gz") as file:
        goals = {row["goal_idx"]: row for row in map(json.loads, file)}
    with gzip.open(folder / "official_reward_pairs.json.gz") as file:
        pairs = json.load(file)
    assert len(pairs) == 161
    for pair in pairs:
        row = goals[pair["goal_idx"]]
        goal = official_goal(row, products[row["asin"]])
        bought = products[pair["asin"]]
        reward = compute_reward(goal, bought, prices[bought.asin], pair["options"].values(), TOKENS)
        assert reward.total == pytest.approx(pair["reward"], abs=1e-6)
        info = pair["info"]
        assert (reward.type_factor, reward.price) == (info["r_type"], info["r_price"])
        assert reward.title_score == pytest.approx(info["title_score"])
        assert reward.attributes / len(goal.attributes) == pytest.approx(info["r_att"])


def official_products() -> dict[str, Product]:
    folder = find_shared("webshop")
    with gzip.open(folder / "items_ins_v2_1000.dev.json.gz") as file:
        attributes = json.load(file)
    with gzip.open(folder / "items_shuffle_1000.json.gz") as file:
        rows = json.load(file)
    return {row["asin"]: read_product(row, attributes[row["asin"]]) for row in rows}


def official_goal(row: dict, product: Product) -> Goal:
    return Goal(
        asin=row["asin"],
        instruction=row["instruction_text"],
        attributes=tuple(row["attributes"]),
        price_upper=row["price_upper"],
        options=tuple(row["goal_options"].items()),
        title=product.title,
        query=product.query,
        product_category=product.product_category,
    )
