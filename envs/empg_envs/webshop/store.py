"""A catalog in one SQLite database: products, goals, search index.

A finished database is read-only and memory-mapped, so that all workers share one copy in the page cache. Each
process caches only recently used entries. A small catalog can be an in-memory database instead.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from empg_envs.webshop.bm25 import Index, IndexBuilder
from empg_envs.webshop.goals import synthetic_weight
from empg_envs.webshop.schema import Goal, Product, goal_from_json, product_from_json
from empg_envs.webshop.shop import MAX_RESULTS

VERSION = 2  # version of the layout below; a catalog of another version is built again
_MAPPED_BYTES = (1 << 31) - (1 << 16)  # SQLite's limit of a map; later bytes are read without it
_GOALS_AT_ONCE = 10_000
_KEPT_PRODUCTS, _KEPT_QUERIES, _KEPT_IDS = 2048, 256, 1 << 16

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE incoming (number INTEGER PRIMARY KEY, asin TEXT UNIQUE, price REAL, record TEXT);
CREATE TABLE product (document INTEGER PRIMARY KEY, asin TEXT, price REAL, record TEXT);
CREATE TABLE goal (position INTEGER PRIMARY KEY, weight REAL NOT NULL, record TEXT NOT NULL);
CREATE TABLE term (term TEXT PRIMARY KEY, postings BLOB NOT NULL);
"""


class StoreWriter:
    """A writer of a new database: first the products, then the goals, then `finish`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Create the tables in the empty database of ``connection``."""
        self._connection = connection
        self._num_products = self._num_goals = 0
        self._counts: Counter[str] = Counter()
        connection.executescript(_TABLES)

    @property
    def num_goals(self) -> int:
        """Number of goals added so far."""
        return self._num_goals

    def add_product(self, product: Product, price: float) -> bool:
        """Add a product with the price of its purchase; return False if its id exists already."""
        cursor = self._connection.execute(
            "INSERT OR IGNORE INTO incoming VALUES (?, ?, ?, ?)",
            (self._num_products, product.asin, price, product.to_json()),
        )
        self._num_products += cursor.rowcount
        return cursor.rowcount == 1

    def products(self) -> Iterable[tuple[Product, float]]:
        """Return the products and prices in their order of insertion."""
        rows = self._connection.execute("SELECT record, price FROM incoming ORDER BY number")
        return ((product_from_json(record), price) for record, price in rows)

    def add_goals(self, goals: Iterable[Goal]) -> None:
        """Add goals; their positions count from 0 in the order of insertion."""
        for goal in goals:
            self._connection.execute(
                "INSERT INTO goal VALUES (?, ?, ?)", (self._num_goals, goal.weight, goal.to_json())
            )
            self._num_goals += 1
            self._counts.update(goal.attributes)

    def weigh_goals(self) -> None:
        """Set the weight of every goal by the rule for synthetic goals."""
        for first in range(0, self._num_goals, _GOALS_AT_ONCE):
            rows = self._connection.execute(
                "SELECT position, record FROM goal WHERE position >= ? ORDER BY position LIMIT ?",
                (first, _GOALS_AT_ONCE),
            ).fetchall()
            self._connection.executemany(
                "UPDATE goal SET weight = ? WHERE position = ?",
                ((synthetic_weight(json.loads(r)["attributes"], self._counts), n) for n, r in rows),
            )

    def finish(self, meta: dict[str, Any]) -> None:
        """Sort the products by id, index them, and store ``meta`` (JSON-able)."""
        connection = self._connection
        connection.execute(
            "INSERT INTO product "
            "SELECT row_number() OVER (ORDER BY asin) - 1, asin, price, record FROM incoming"
        )
        connection.execute("DROP TABLE incoming")
        connection.execute("CREATE UNIQUE INDEX product_asin ON product (asin)")
        builder = IndexBuilder()
        for (record,) in connection.execute("SELECT record FROM product ORDER BY document"):
            builder.add(product_from_json(record).search_text())
        connection.executemany("INSERT INTO term VALUES (?, ?)", builder.finish())
        facts = {**meta, "version": VERSION, "products": self._num_products, "goals": self._num_goals}
        connection.executemany(
            "INSERT INTO meta VALUES (?, ?)", ((key, json.dumps(value)) for key, value in facts.items())
        )
        connection.commit()


class Store:
    """A finished catalog.

    Attributes:
      meta: the ``meta`` of `StoreWriter.finish`, with the numbers of ``products`` and ``goals``.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Open the database of ``connection``, which a `StoreWriter` has finished."""
        self._connection = connection
        self.meta: dict[str, Any] = {
            key: json.loads(value) for key, value in connection.execute("SELECT key, value FROM meta")
        }
        self._index = Index(self.meta["products"], self._postings)
        self._ids: dict[int, str] = {}
        self.product = functools.lru_cache(maxsize=_KEPT_PRODUCTS)(self._read_product)
        self.search = functools.lru_cache(maxsize=_KEPT_QUERIES)(self.search_afresh)

    @property
    def num_goals(self) -> int:
        """Number of goals."""
        return int(self.meta["goals"])

    def price(self, asin: str) -> float:
        """Return the price of a purchase of a product."""
        return float(self._one("SELECT price FROM product WHERE asin = ?", asin)[0])

    def goal(self, position: int) -> Goal:
        """Return the goal at a position in the order of insertion."""
        record, weight = self._one("SELECT record, weight FROM goal WHERE position = ?", position)
        return dataclasses.replace(goal_from_json(record), weight=weight)

    def find_copies(self, positions: Sequence[int]) -> set[int]:
        """Return the positions of all goals with the content of one of these, themselves included."""
        marks = ",".join("?" * len(positions))
        rows = self._connection.execute(
            "SELECT position FROM goal "
            f"WHERE record IN (SELECT record FROM goal WHERE position IN ({marks}))",
            positions,
        )
        return {position for (position,) in rows}

    def search_afresh(self, query: str) -> Sequence[str]:
        """Return the ids of the best products for a query without a cache; `search` has one."""
        found = [document for document, _ in self._index.search(query, MAX_RESULTS)]
        missing = [document for document in found if document not in self._ids]
        if missing:
            if len(self._ids) > _KEPT_IDS:
                self._ids.clear()
                missing = found
            marks = ",".join("?" * len(missing))
            self._ids.update(
                self._connection.execute(
                    f"SELECT document, asin FROM product WHERE document IN ({marks})", missing
                )
            )
        return tuple(self._ids[document] for document in found)

    def _read_product(self, asin: str) -> Product:
        return product_from_json(self._one("SELECT record FROM product WHERE asin = ?", asin)[0])

    def _postings(self, term: str) -> bytes | None:
        row = self._connection.execute("SELECT postings FROM term WHERE term = ?", (term,)).fetchone()
        return None if row is None else row[0]

    def _one(self, query: str, key: str | int) -> tuple[Any, ...]:
        row: tuple[Any, ...] | None = self._connection.execute(query, (key,)).fetchone()
        if row is None:
            raise KeyError(f"the webshop catalog has nothing under {key!r}")
        return row


@functools.lru_cache(maxsize=8)
def open_store(path: Path) -> Store:
    """Open a finished catalog file, memory-mapped; all callers in a process get the same object."""
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True, check_same_thread=False
    )
    connection.execute(f"PRAGMA mmap_size = {_MAPPED_BYTES}")
    connection.execute(
        "PRAGMA cache_size = -256"
    )  # a private cache of 256 KiB suffices, because the map serves reads
    return Store(connection)
