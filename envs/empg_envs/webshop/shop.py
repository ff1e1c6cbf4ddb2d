"""The shop's state machine: the current page, its clickable elements, and the effects of clicks.

A `Visit` is one episode over a `Catalog`. It contains no texts of pages; `pages` renders them. The
transitions are those of WebShop's text mode, including its quirks. A search is possible from every page.
Leaving an item's page by ``< prev`` forgets the chosen options. A value of two options belongs to the later
one. After the last result there are infinitely many empty pages.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from empg_envs.webshop.schema import Goal, Product

MAX_RESULTS = 50
BACK, NEXT, PREVIOUS, BUY = "back to search", "next >", "< prev", "buy now"
DETAILS = ("description", "features", "reviews")
_SEARCH = "search"


class Catalog(Protocol):
    """The part of a catalog that a visit uses."""

    def product(self, asin: str) -> Product:
        """Return the product of that id."""
        ...

    def search(self, query: str) -> Sequence[str]:
        """Return the ids of the best products for a query, at most `MAX_RESULTS`, best first."""
        ...


class Page(enum.Enum):
    """The kind of a page."""

    SEARCH = "search"
    RESULTS = "results"
    ITEM = "item"
    DETAIL = "detail"
    DONE = "done"


class Visit:
    """The state of one episode.

    Attributes:
      goal: the goal.
      page: kind of the current page.
      number: number of the results page, from 1.
      query: words of the last search.
      results: ids of its results.
      product: the opened product, or None.
      detail: the open page of `DETAILS` on a detail page.
      chosen: option name -> chosen value.
    """

    __slots__ = (
        *("_catalog", "_owners", "goal", "page", "page_size", "query", "results", "number"),
        *("product", "detail", "chosen"),
    )

    def __init__(self, catalog: Catalog, goal: Goal, page_size: int = 10) -> None:
        """Start on the search page; ``page_size`` is the number of results per page."""
        self._catalog = catalog
        self.goal = goal
        self.page_size = page_size
        self.query = ""
        self.results: Sequence[str] = ()
        self._leave()

    def _leave(self) -> None:
        self.page = Page.SEARCH
        self.number = 1
        self.product: Product | None = None
        self.detail = ""
        self.chosen: dict[str, str] = {}
        self._owners: Mapping[str, str] = {}

    @property
    def shown(self) -> Sequence[str]:
        """Product ids on the current results page."""
        return self.results[(self.number - 1) * self.page_size : self.number * self.page_size]

    @property
    def values(self) -> Collection[str]:
        """Option values on the item's page."""
        return self._owners.keys() if self.page is Page.ITEM else ()

    def clickables(self) -> list[str]:
        """Return the names of the clickable elements, in the order of the page."""
        if self.page is Page.SEARCH:
            return [_SEARCH]
        if self.page is Page.RESULTS:
            back = [PREVIOUS] if self.number > 1 else []
            return list(dict.fromkeys([BACK, *back, NEXT, *(asin.lower() for asin in self.shown)]))
        if self.page is Page.ITEM:
            return list(dict.fromkeys([BACK, PREVIOUS, *DETAILS, BUY, *self._owners]))
        return [BACK, PREVIOUS] if self.page is Page.DETAIL else []

    def search(self, query: str) -> None:
        """Search for a query; this is possible on every page."""
        self._leave()
        self.page = Page.RESULTS
        self.query = query
        self.results = self._catalog.search(query)

    def click(self, name: str) -> bool:
        """Click an element of the page.

        Args:
          name: name of the element in lower case.

        Returns:
          Whether the page has such an element; if not, nothing changed.
        """
        if name == _SEARCH or name not in self.clickables():
            return False
        if name == BUY:
            self.page = Page.DONE
        elif name == BACK:
            self._leave()
        elif self.page is Page.RESULTS:
            self._click_result(name)
        elif self.page is Page.DETAIL:
            self.page = Page.ITEM
        elif name == PREVIOUS:
            number = self.number
            self._leave()
            self.page, self.number = Page.RESULTS, number
        elif name in DETAILS:
            self.page, self.detail = Page.DETAIL, name
        else:
            self.chosen[self._owners[name]] = name
        return True

    def _click_result(self, name: str) -> None:
        if name == NEXT:
            self.number += 1
        elif name == PREVIOUS:
            self.number -= 1
        else:
            self.page = Page.ITEM
            self.product = self._catalog.product(next(a for a in self.shown if a.lower() == name))
            self._owners = {
                value: option for option, values in self.product.options.items() for value in values
            }
