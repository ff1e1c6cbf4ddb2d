"""Two ways to tell a visit: as pages like the original's, or in few words for small models.

A style says what a page reads like, which actions it offers, and what an action text means. The engine below
is the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from empg_envs.webshop.actions import CLICK, SEARCH, Action, parse_action
from empg_envs.webshop.pages import render
from empg_envs.webshop.reward import Reward
from empg_envs.webshop.shop import BACK, BUY, NEXT, PREVIOUS, Catalog, Page, Visit

SEARCH_HINT = "search[<your query>]"


class Style(Protocol):
    """How a visit is told and understood."""

    def render(self, visit: Visit, reward: Reward | None) -> str:
        """Return the page shown now."""
        ...

    def read(self, text: str, visit: Visit) -> Action:
        """What an action text means on that page; an action without a name means nothing."""
        ...

    def write(self, action: Action, visit: Visit) -> str:
        """Return the text that `read` understands as that action."""
        ...

    def admissible(self, visit: Visit) -> list[str]:
        """Return action texts that do something now; not sorted."""
        ...


class PageStyle:
    """Pages and actions of the original's text mode.

    A query can be any words; the page where a search is natural offers `SEARCH_HINT` in their place.
    """

    def __init__(self, catalog: Catalog) -> None:
        """Initialize with ``catalog``: where titles and prices are looked up."""
        self._catalog = catalog

    def render(self, visit: Visit, reward: Reward | None) -> str:
        """See `pages.render`."""
        return render(visit, self._catalog, reward)

    def read(self, text: str, visit: Visit) -> Action:
        """See `actions.parse_action`."""
        return parse_action(text)

    def write(self, action: Action, visit: Visit) -> str:
        """Return ``search[words]`` or ``click[name]``."""
        return f"{action.name}[{action.argument}]"

    def admissible(self, visit: Visit) -> list[str]:
        """Return the search hint on the search page, and all clicks."""
        if visit.page is Page.SEARCH:
            return [SEARCH_HINT]
        return [f"{CLICK}[{name}]" for name in visit.clickables()]


VERBS = {"next page": NEXT, "previous page": PREVIOUS, "leave": BACK, "buy": BUY}
_OPEN = re.compile(r"open item ([0-9]{1,4})")


class TerseStyle:
    """A page in a few words, what is wanted at its end.

    ``search WORDS``, ``open item 2``, ``pick VALUE``, ``next page``, ``previous page``, ``leave`` (to the
    search page), ``buy``. Results are numbered on their page; descriptions are not offered. Chosen values
    are shown, which the original's text mode does not do.
    """

    def __init__(self, catalog: Catalog, queries: Sequence[str]) -> None:
        """Initialize with ``queries``: words that the search page offers to search for."""
        self._catalog = catalog
        self._queries = queries

    def render(self, visit: Visit, reward: Reward | None) -> str:
        """What the page shows, then ``want`` and the instruction."""
        if visit.page is Page.DONE:
            assert reward is not None
            return f"bought . score {reward.total:.2f}"
        return " ".join([*self._shown(visit), "want", visit.goal.instruction])

    def _shown(self, visit: Visit) -> list[str]:
        if visit.page is Page.SEARCH:
            return ["search page"]
        if visit.page is Page.RESULTS:
            shown = [self._catalog.product(asin) for asin in visit.shown]
            items = [f"item {n} {product.title} {product.price_tag}" for n, product in enumerate(shown, 1)]
            return [*(["previous page"] if visit.number > 1 else []), *(items or ["nothing"])]
        product = visit.product
        assert product is not None
        if visit.page is Page.DETAIL:
            return [product.description if visit.detail == "description" else " ".join(product.bullets)]
        words = [product.title, product.price_tag]
        for name, values in product.options.items():
            words += [name, *values]
        return [*words, "chosen", *(visit.chosen.values() or ["nothing"])]

    def read(self, text: str, visit: Visit) -> Action:
        """Read a terse command; blanks and case do not matter."""
        words = " ".join(text.lower().split())
        verb, _, rest = words.partition(" ")
        if words in VERBS:
            return Action(CLICK, VERBS[words])
        if verb == SEARCH and rest:
            return Action(SEARCH, rest)
        if verb == "pick" and rest in visit.values:
            return Action(CLICK, rest)
        opened = _OPEN.fullmatch(words)
        if opened and visit.page is Page.RESULTS and 0 < int(opened[1]) <= len(visit.shown):
            return Action(CLICK, visit.shown[int(opened[1]) - 1].lower())
        return Action("")

    def write(self, action: Action, visit: Visit) -> str:
        """Return the terse command."""
        if action.name == SEARCH:
            return f"{SEARCH} {action.argument}"
        verb = next((verb for verb, name in VERBS.items() if name == action.argument), None)
        if verb is not None:
            return verb
        if visit.page is Page.RESULTS:
            number = [asin.lower() for asin in visit.shown].index(action.argument) + 1
            return f"open item {number}"
        return f"pick {action.argument}"

    def admissible(self, visit: Visit) -> list[str]:
        """Return every command that does something; on the search page, a search for each of the queries."""
        if visit.page is Page.SEARCH:
            return [f"{SEARCH} {query}" for query in self._queries]
        if visit.page is Page.RESULTS:
            found = [f"open item {number}" for number in range(1, len(visit.shown) + 1)]
            if visit.number > 1:
                found.append("previous page")
            if visit.number * visit.page_size < len(visit.results):
                found.append("next page")
            return [*found, "leave"]
        if visit.page is Page.ITEM:
            return [*(f"pick {value}" for value in visit.values), "previous page", "leave", "buy"]
        return ["previous page", "leave"] if visit.page is Page.DETAIL else []
