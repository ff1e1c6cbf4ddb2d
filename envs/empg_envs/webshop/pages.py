"""Pages of WebShop's text mode: the visible texts of a page, separated by `` [SEP] ``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from empg_envs.webshop.reward import Reward
from empg_envs.webshop.shop import MAX_RESULTS, Catalog, Page, Visit

SEPARATOR = " [SEP] "
# The page after a purchase. In text mode the original does not fill in its details.
_RECEIPT_HEAD = (
    "Thank you for shopping with us!",
    "Your code:",
    "None",
    "(Paste it in your MTurk interface.)",
    "Purchased",
    "asin",
)
_RECEIPT_REST = (
    *("attrs", "None", "category", "None", "query", "None", "product category", "None"),
    *("Target", "asin", "options", "attrs", "price upper", "instuction text"),
    *("category", "product category", "query", "Goal", "None"),
    *("Reward", "Your score (min 0.0, max 1.0)"),
)
# In JSON within a page, the special characters of HTML are escaped.
_ESCAPED = {ord(character): f"\\u{ord(character):04x}" for character in "<>&'"}


def render(visit: Visit, catalog: Catalog, reward: Reward | None = None) -> str:
    """Return the text of the page that a visit is on; ``reward`` is shown on the page after a purchase."""
    if visit.page is Page.DONE:
        assert reward is not None
        segments: Iterable[str] = _receipt(visit, reward)
    else:
        segments = _page(visit, catalog)
    # As in the original, empty texts and single line breaks are dropped; all others are stripped and kept,
    # even if nothing remains.
    return SEPARATOR.join(text.strip() for text in segments if text not in ("", "\n"))


def _page(visit: Visit, catalog: Catalog) -> Iterator[str]:
    if visit.page is Page.SEARCH:
        yield "WebShop"
    yield "Instruction:"
    yield visit.goal.instruction
    if visit.page is Page.SEARCH:
        yield "Search"
        return
    yield "Back to Search"
    if visit.page is Page.RESULTS:
        yield from _results(visit, catalog)
        return
    yield "< Prev"
    yield from _item(visit) if visit.page is Page.ITEM else _detail(visit)


def _results(visit: Visit, catalog: Catalog) -> Iterator[str]:
    yield f"Page {visit.number} (Total results: {min(len(visit.results), MAX_RESULTS)})"
    if visit.number > 1:
        yield "< Prev"
    yield "Next >"
    for asin in visit.shown:
        product = catalog.product(asin)
        yield asin
        yield product.title
        yield product.price_tag


def _item(visit: Visit) -> Iterator[str]:
    product = visit.product
    assert product is not None
    for name, values in product.options.items():
        yield name
        yield from values
    yield product.title
    yield f"Price: {product.price_tag}"
    yield "Rating: N.A."
    yield from ("Description", "Features", "Reviews", "Buy Now")


def _detail(visit: Visit) -> Iterator[str]:
    product = visit.product
    assert product is not None
    if visit.detail == "description":
        yield product.description
    elif visit.detail == "features":
        # The original's template has a blank before each, so that an empty bullet is a segment, too.
        yield from (f" {bullet}" for bullet in product.bullets)


def _receipt(visit: Visit, reward: Reward) -> Iterator[str]:
    assert visit.product is not None
    yield from _RECEIPT_HEAD
    yield visit.product.asin
    yield "options"
    yield json.dumps(visit.chosen, sort_keys=True).translate(_ESCAPED)
    yield from _RECEIPT_REST
    yield str(reward.total)
    yield "Reward Details"
    yield "None"
