"""Two experts: one knows the product of the goal, the other one uses only the shown texts.

Neither has an internal plan. The next action is a function of the page, so that both continue sensibly from
every state.
"""

from __future__ import annotations

import re

from empg_envs.webshop.actions import CLICK, SEARCH, Action
from empg_envs.webshop.schema import Product
from empg_envs.webshop.shop import BACK, BUY, NEXT, PREVIOUS, Catalog, Page, Visit

_PAGES_LOOKED_AT = 3  # number of result pages before a search for the product's whole title
_LIMIT = re.compile(r"(?:(?:lower|less) than|at most|under|budget is) \$?(\d+(?:\.\d+)?)")
_PRICE_PART = re.compile(r",? ?(?:and )?price (?:lower|less) than .*$", re.DOTALL)
_WORD = re.compile(r"\w+")


def choose_by_goal(visit: Visit, catalog: Catalog) -> Action:
    """Return the next action to find the goal's product, to choose its options and to buy it.

    The expert searches for the wanted attributes and the kind of product, as an instruction names them. If
    the product is not among the first results, it searches for the title.
    """
    goal, product = visit.goal, visit.product
    if visit.page is Page.DETAIL:
        return Action(CLICK, PREVIOUS)
    if visit.page is Page.ITEM and product is not None:
        if product.asin != goal.asin:
            return Action(CLICK, PREVIOUS)
        return _complete(visit, product, [w if isinstance(w, str) else w[1] for w in goal.options])
    by_words = " ".join([*goal.attributes, goal.query])
    by_title = goal.title.lower()
    if visit.page is Page.RESULTS and visit.query in (by_words, by_title) and goal.asin in visit.results:
        target = visit.results.index(goal.asin) // visit.page_size + 1
        if target == visit.number:
            return Action(CLICK, goal.asin.lower())
        if visit.query == by_title or target <= _PAGES_LOOKED_AT:
            return Action(CLICK, NEXT if visit.number < target else PREVIOUS)
    if visit.page is Page.RESULTS and visit.query == by_words:
        return Action(SEARCH, by_title)
    if visit.page is Page.RESULTS and goal.asin in visit.shown:
        return Action(CLICK, goal.asin.lower())
    return Action(SEARCH, by_words)


def _complete(visit: Visit, product: Product, wanted: list[str]) -> Action:
    """Click the next wanted value that is not chosen yet, or buy."""
    for values in product.options.values():
        for value in wanted:
            if value in values and value in visit.values and value not in visit.chosen.values():
                return Action(CLICK, value)
    return Action(CLICK, BUY)


def choose_by_rules(visit: Visit, catalog: Catalog) -> Action:
    """Return the next action of the rule-based baseline, which uses only the shown texts.

    It searches for the instruction without its price. It opens the affordable result whose title shares the
    most words with the instruction. It chooses the option values that the instruction names, and buys.
    """
    instruction = visit.goal.instruction.lower()
    if visit.page is Page.SEARCH:
        return Action(SEARCH, _PRICE_PART.sub("", instruction) or instruction)
    if visit.page is Page.RESULTS:
        if not visit.shown:
            return Action(CLICK, BACK) if visit.results else Action(SEARCH, _last_words(instruction))
        return Action(CLICK, _best_result(visit, catalog, instruction).lower())
    if visit.page is Page.ITEM and visit.product is not None:
        named = [_named_value(values, instruction) for values in visit.product.options.values()]
        return _complete(visit, visit.product, [value for value in named if value])
    return Action(CLICK, PREVIOUS)


def _last_words(instruction: str) -> str:
    return " ".join(_WORD.findall(instruction)[-3:]) or "shop"


def _best_result(visit: Visit, catalog: Catalog, instruction: str) -> str:
    wanted, limit = {*_WORD.findall(instruction)}, _read_limit(instruction)

    def merit(asin: str) -> tuple[bool, int]:
        product = catalog.product(asin)
        shared = len(wanted & {*_WORD.findall(product.title.lower())})
        return min(product.prices, default=0.0) <= limit, shared

    return max(visit.shown, key=merit)  # ties go to the first, which the search engine ranks higher


def _read_limit(instruction: str) -> float:
    match = _LIMIT.search(instruction)
    return float(match[1]) if match else float("inf")


def _named_value(values: tuple[str, ...], instruction: str) -> str | None:
    """Return the longest value that occurs in the instruction as whole words."""
    named = [v for v in values if re.search(rf"(?<!\w){re.escape(v.strip())}(?!\w)", instruction)]
    return max(named, key=len, default=None)
