"""Pages and clicks: WebShop's text mode, from a small shop and from recorded episodes of the original."""

import gzip
import json
from pathlib import Path

import pytest

from empg_envs.webshop.actions import parse_action
from empg_envs.webshop.bm25 import Index, IndexBuilder
from empg_envs.webshop.pages import render
from empg_envs.webshop.reward import Reward, compute_reward
from empg_envs.webshop.schema import Goal, Product, read_product
from empg_envs.webshop.shop import Page, Visit
from empg_envs.webshop.tagger import make_tagger
from tests.shared import find_shared


def make_product(number: int, **changes: object) -> Product:
    row = {
        "asin": f"B{number:03d}",
        "name": f"  Lamp {number} ",
        "full_description": "",
        "small_description": ["first", "", "\n", " "],
        "pricing": f"${number}.5",
        "product_category": "Home",
        "category": "garden",
        "query": "lamps",
        "customization_options": {},
    }
    return read_product(row | changes, None)


CLASHING = {
    "Color": [{"value": "Red"}, {"value": "one size"}, {"value": "buy now"}],
    "size": [{"value": "one size"}, {"value": "a/b"}, {"value": "it's <big>"}],
}


class Shelf:
    """A catalog of which every search finds everything but what it names."""

    def __init__(self, count: int = 23) -> None:
        found = [make_product(n) for n in range(count - 1)]
        found[3] = make_product(3, asin="b003x")
        found.append(make_product(count - 1, customization_options=CLASHING, full_description="About it.\n"))
        self._products = {product.asin: product for product in found}

    def product(self, asin: str) -> Product:
        return self._products[asin]

    def search(self, query: str) -> list[str]:
        return [asin for asin in self._products if asin.lower() != query]


SHELF = Shelf()
GOAL = Goal("B022", "find a lamp", (), 9.0, (), "Lamp", "lamps", "Home")


def visit_item(asin: str) -> Visit:
    visit = Visit(SHELF, GOAL)
    visit.search("lamp")
    while asin not in visit.clickables():
        visit.click("next >")
    assert visit.click(asin)
    return visit


def test_search_page() -> None:
    visit = Visit(SHELF, GOAL)
    assert render(visit, SHELF) == "WebShop [SEP] Instruction: [SEP] find a lamp [SEP] Search"
    assert visit.clickables() == ["search"]
    assert not visit.click("search") and not visit.click("buy now") and visit.page is Page.SEARCH


def test_result_pages_go_on_without_end() -> None:
    visit = Visit(SHELF, GOAL)
    visit.search("lamp")
    head = "Instruction: [SEP] find a lamp [SEP] Back to Search"
    text = render(visit, SHELF)
    assert text.startswith(
        f"{head} [SEP] Page 1 (Total results: 23) [SEP] Next > [SEP] B000 [SEP] Lamp 0 [SEP] $0.5"
    )
    assert visit.clickables() == [
        "back to search",
        "next >",
        *(f"b{n:03d}" + "x" * (n == 3) for n in range(10)),
    ]
    assert visit.click("b003x") and visit.product is not None  # an id that is not all upper-case
    visit.click("< prev")
    visit.click("next >")
    visit.click("next >")
    assert visit.clickables() == ["back to search", "< prev", "next >", "b020", "b021", "b022"]
    visit.click("next >")
    assert render(visit, SHELF) == f"{head} [SEP] Page 4 (Total results: 23) [SEP] < Prev [SEP] Next >"
    assert visit.clickables() == ["back to search", "< prev", "next >"]


def test_item_page_and_its_quirks() -> None:
    visit = visit_item("b022")
    assert render(visit, SHELF).endswith(
        "Back to Search [SEP] < Prev [SEP] color [SEP] red [SEP] one size [SEP] buy now [SEP] "
        "size [SEP] one size [SEP] a | b [SEP] it's <big> [SEP] Lamp 22 [SEP] Price: $22.5 [SEP] "
        "Rating: N.A. [SEP] Description [SEP] Features [SEP] Reviews [SEP] Buy Now"
    )
    head = ["back to search", "< prev", "description", "features", "reviews", "buy now"]
    assert visit.clickables() == [*head, "red", "one size", "a | b", "it's <big>"]
    before = render(visit, SHELF)
    for value in ("red", "a | b", "one size"):
        assert visit.click(value)
    assert render(visit, SHELF) == before  # chosen values do not show
    assert visit.chosen == {
        "color": "red",
        "size": "one size",
    }  # of two options with a value, the later has it
    visit.click("buy now")  # also an option's value; the button wins
    assert visit.page is Page.DONE and visit.clickables() == []


def test_leaving_an_item_forgets_options_and_leaving_a_sub_page_does_not() -> None:
    visit = visit_item("b022")
    visit.click("red")
    for detail in ("description", "features", "reviews"):
        assert visit.click(detail) and visit.clickables() == ["back to search", "< prev"]
        assert visit.click("< prev") and visit.page is Page.ITEM and visit.chosen == {"color": "red"}
    visit.click("< prev")
    assert (visit.page, visit.number, visit.chosen) == (Page.RESULTS, 3, {})
    visit.click("b022")
    visit.click("red")
    visit.search("other")
    assert (visit.page, visit.number, visit.chosen, visit.query) == (Page.RESULTS, 1, {}, "other")


@pytest.mark.parametrize(
    ("asin", "detail", "texts"),
    [
        ("b022", "description", " [SEP] About it."),
        ("b001", "description", ""),
        # A bullet without a text is a segment; a description without one is none.
        ("b001", "features", " [SEP] first [SEP]  [SEP]  [SEP] "),
        ("b001", "reviews", ""),
    ],
)
def test_sub_pages(asin: str, detail: str, texts: str) -> None:
    visit = visit_item(asin)
    visit.click(detail)
    assert render(visit, SHELF) == f"Instruction: [SEP] find a lamp [SEP] Back to Search [SEP] < Prev{texts}"


def test_receipt() -> None:
    visit = visit_item("b022")
    visit.click("it's <big>")
    visit.click("red")
    visit.click("buy now")
    text = render(visit, SHELF, Reward(0.5, 1.0, 1.0, 0, 0, True))
    assert (
        'B022 [SEP] options [SEP] {"color": "red", "size": "it\\u0027s \\u003cbig\\u003e"} [SEP] attrs'
        in text
    )
    assert text.endswith("[SEP] 0.5 [SEP] Reward Details [SEP] None")


@pytest.mark.shared_data
def test_recorded_episodes_of_the_original() -> None:
    """Every observation, list of clickables, reward and end of 121 episodes; no difference is allowed."""
    folder = find_shared("webshop")
    shop = OfficialShelf(folder)
    prices = json.loads((folder / "product_prices_seed42.json").read_text())
    tagger = make_tagger("tokens")
    with gzip.open(folder / "official_sim_traces.json.gz") as file:
        episodes = json.load(file)
    compared = 0
    for episode in episodes:
        visit = Visit(shop, shop.goal(episode))
        assert render(visit, shop) == episode["first_obs"]
        for step in episode["steps"]:
            name, argument = parse_action(step["action"])
            if name == "search":
                visit.search(argument)
            elif name == "click":
                visit.click(argument)
            reward = None
            if visit.page is Page.DONE:
                bought = visit.product
                price = prices[bought.asin]
                reward = compute_reward(visit.goal, bought, price, visit.chosen.values(), tagger)
            assert render(visit, shop, reward) == step["obs"], step["action"]
            assert visit.clickables() == step["clickables"]
            assert (visit.page is Page.SEARCH) == step["has_search"]
            assert (reward is not None) == step["done"]
            assert (reward.total if reward else 0.0) == pytest.approx(step["reward"], abs=1e-6)
            compared += 1
    assert compared == 796


class OfficialShelf:
    """The 1,000 official products in memory."""

    def __init__(self, folder: Path) -> None:
        with gzip.open(folder / "items_ins_v2_1000.dev.json.gz") as file:
            attributes = json.load(file)
        with gzip.open(folder / "items_shuffle_1000.json.gz") as file:
            rows = sorted(json.load(file), key=lambda row: row["asin"])
        self._products = {row["asin"]: read_product(row, attributes[row["asin"]]) for row in rows}
        self._ids = list(self._products)
        builder = IndexBuilder()
        for product in self._products.values():
            builder.add(product.search_text())
        self._index = Index(len(rows), dict(builder.finish()).get)

    def product(self, asin: str) -> Product:
        return self._products[asin]

    def search(self, query: str) -> list[str]:
        return [self._ids[number] for number, _ in self._index.search(query, 50)]

    def goal(self, episode: dict) -> Goal:
        product = self._products[episode["asin"]]
        return Goal(
            asin=product.asin,
            instruction=episode["instruction"],
            attributes=tuple(episode["attributes"]),
            price_upper=episode["price_upper"],
            options=tuple(episode["goal_options"].items()),
            title=product.title,
            query=product.query,
            product_category=product.product_category,
        )
