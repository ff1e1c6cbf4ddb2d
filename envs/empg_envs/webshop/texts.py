"""Two styles of observations and actions: pages like the original's, or few words for small models.

A style defines the text of a page, the offered actions, and the meaning of an action text. The state machine
(`shop`) is the same for both.
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
    """A style of observations and actions."""

    def render(self, visit: Visit, reward: Reward | None) -> str:
        """Return the text of the current page."""
        ...

    def read(self, text: str, visit: Visit) -> Action:
        """Parse an action text on the current page; an action without a name has no effect."""
        ...

    def write(self, action: Action, visit: Visit) -> str:
        """Return the text that `read` parses to this action."""
        ...

    def admissible(self, visit: Visit) -> list[str]:
        """Return the texts of the possible actions, not sorted."""
        ...


class PageStyle:
    """The pages and actions of the original's text mode.

    A query can be any text; the search page offers `SEARCH_HINT` instead of all queries.
    """

    def __init__(self, catalog: Catalog) -> None:
        """Store the catalog, which gives titles and prices."""
        self._catalog = catalog

    def render(self, visit: Visit, reward: Reward | None) -> str:
        """Render the page by `pages.render`."""
        return render(visit, self._catalog, reward)

    def read(self, text: str, visit: Visit) -> Action:
        """Parse the action by `actions.parse_action`."""
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
    """Pages in few words, with the instruction at the end.

    The actions are ``search WORDS``, ``open item 2``, ``pick VALUE``, ``next page``, ``previous page``,
    ``leave`` (to the search page) and ``buy``. Results are numbered on their page. Descriptions cannot be
    opened. Chosen values are shown, unlike in the original's text mode.
    """

    def __init__(self, catalog: Catalog, queries: Sequence[str]) -> None:
        """Store the catalog, and the queries that the search page offers."""
        self._catalog = catalog
        self._queries = queries

    def render(self, visit: Visit, reward: Reward | None) -> str:
        """Return the page's content, then ``want`` and the instruction."""
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
        """Parse a terse command; blanks and case do not matter."""
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
        """Return every possible command; the search page has a search for each of the queries."""
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
