"""Generated catalogs from the words of `assortment`; products and goals are the same on every machine.

``tiny`` has few words, three results per page, and a closed vocabulary. ``standard`` has more than a thousand
products and pages like the original's. Only the product decides the split of a goal, so that held-out goals
ask for products that no training goal asks for.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import random
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from empg_envs.names import look_up
from empg_envs.webshop import assortment as words
from empg_envs.webshop.assortment import Department
from empg_envs.webshop.schema import CATEGORY_MARK, Goal, Product
from empg_envs.webshop.store import Store, StoreWriter
from empg_envs.webshop.tagger import Tagger, lexicon_tagger

SPLITS = ("train", "valid", "test")
_GOALS_PER_PRODUCT = 6
_LIMIT_STEP = 10.0
_PATH = f" {CATEGORY_MARK} "
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Level:
    """A generated shop.

    Attributes:
      name: name of the level.
      page_size: number of results on a page.
      max_turns: default number of steps after which an episode is truncated.
      shares: share of the products in each of `SPLITS`.
    """

    name: str
    page_size: int
    max_turns: int
    shares: tuple[float, float, float]


LEVELS = {
    "tiny": Level("tiny", page_size=3, max_turns=8, shares=(0.6, 0.1, 0.3)),
    "standard": Level("standard", page_size=10, max_turns=15, shares=(0.8, 0.1, 0.1)),
}


class Shop(NamedTuple):
    """A generated catalog with its panels and its tagger.

    Attributes:
      store: products, search, goals.
      panels: split -> positions of its goals.
      tagger: tagger of the catalog's nouns.
      kinds: names of all kinds of goods, sorted.
    """

    store: Store
    panels: dict[str, Sequence[int]]
    tagger: Tagger
    kinds: tuple[str, ...]


def find_level(name: str) -> Level:
    """Return the level of that name; an unknown name raises a `ValueError` with the nearest one."""
    return look_up("webshop level", name, LEVELS)


@functools.lru_cache(maxsize=len(LEVELS))
def load_shop(name: str) -> Shop:
    """Generate the catalog of a level; all environments of a process share one object."""
    level = find_level(name)
    # The finished database is only read, so several threads may share the connection.
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    writer = StoreWriter(connection)
    goals: dict[str, list[Goal]] = {split: [] for split in SPLITS}
    rng = random.Random(f"webshop/{name}")
    for product, its_goals in _tiny(rng) if name == "tiny" else _standard(rng):
        writer.add_product(product, product.prices[0])
        goals[_split_of(product, level)] += its_goals
    panels: dict[str, Sequence[int]] = {}
    for split in SPLITS:
        first = writer.num_goals
        # Sorting by hash mixes the goals of different products.
        writer.add_goals(sorted(goals[split], key=Goal.content_hash))
        panels[split] = range(first, writer.num_goals)
    writer.finish({"skipped": 0, "skipped_rows": []})
    kinds = words.TINY_KINDS if name == "tiny" else tuple(_kinds())
    nouns = {word for kind in kinds for word in kind.split()}
    return Shop(Store(connection), panels, lexicon_tagger(nouns), tuple(sorted(kinds)))


def _split_of(product: Product, level: Level) -> str:
    share = int.from_bytes(hashlib.blake2b(product.asin.encode(), digest_size=4).digest(), "big") / 2**32
    for split, width in zip(SPLITS[:-1], level.shares, strict=False):
        if share < width:
            return split
        share -= width
    return SPLITS[-1]


def _id(*name: object) -> str:
    """Return a product id of ten characters whose order is independent of the product's content."""
    return "E" + hashlib.blake2b("/".join(map(str, name)).encode(), digest_size=8).hexdigest()[:9].upper()


def _pick(rng: random.Random, items: Sequence[T]) -> T:
    # Only random() gives guaranteed equal results in every version of Python.
    return items[int(rng.random() * len(items))]


def _some(rng: random.Random, items: Iterable[T], count: int) -> list[T]:
    """Draw ``count`` different items; they keep their order."""
    pool = list(enumerate(items))
    chosen = [pool.pop(int(rng.random() * len(pool))) for _ in range(count)]
    return [item for _, item in sorted(chosen, key=lambda pair: pair[0])]


def _make_goal(
    product: Product, instruction: str, attributes: Sequence[str], limit: float, options: Sequence[str]
) -> Goal:
    return Goal(
        asin=product.asin,
        instruction=instruction,
        attributes=tuple(attributes),
        price_upper=limit,
        options=tuple(options),
        title=product.title,
        query=product.query,
        product_category=product.product_category,
    )


def _tiny(rng: random.Random) -> Iterator[tuple[Product, list[Goal]]]:
    """Yield products of every kind with every pair of attributes, and a goal per combination of options.

    Each product occurs at one or two prices.
    """
    for kind in words.TINY_KINDS:
        for pair in itertools.combinations(words.TINY_ATTRIBUTES, 2):
            title = " ".join([*pair, kind])
            for price in _some(rng, words.TINY_PRICES, 1 + int(rng.random() * 2)):
                colors = _some(rng, words.TINY_COLORS, 3)
                product = Product(
                    asin=_id("tiny", title, price),
                    title=title,
                    description=title,
                    bullets=pair,
                    price_tag=f"at {price}",
                    prices=(float(price),),
                    options={"color": tuple(colors), "size": words.TINY_SIZES},
                    attributes=pair,
                    category="tiny",
                    query=kind,
                    product_category=_PATH.join(("tiny", kind)),
                )
                choices = itertools.product(colors, words.TINY_SIZES)
                yield product, [_tiny_goal(product, price, color, size) for color, size in choices]


def _tiny_goal(product: Product, price: int, color: str, size: str) -> Goal:
    # Half a step above the price: the same product at the next higher price does not meet the goal.
    limit = price + _LIMIT_STEP / 2
    instruction = f"{product.title} {color} {size} under {limit:.0f}"
    return _make_goal(product, instruction, product.attributes, limit, (color, size))


def _kinds() -> Iterator[str]:
    return (k for department in words.DEPARTMENTS for kinds in department.kinds.values() for k in kinds)


def _standard(rng: random.Random) -> Iterator[tuple[Product, list[Goal]]]:
    for department in words.DEPARTMENTS:
        for shelf, kinds in department.kinds.items():
            for kind in kinds:
                for number in range(words.PER_KIND):
                    yield _standard_product(rng, department, shelf, kind, number)


def _standard_product(
    rng: random.Random, department: Department, shelf: str, kind: str, number: int
) -> tuple[Product, list[Goal]]:
    attributes = _some(rng, department.attributes, 3 + int(rng.random() * 2))
    material, use = _pick(rng, department.materials), _pick(rng, department.uses)
    brand = _pick(rng, words.BRANDS)
    lowest, highest = department.prices
    price = lowest + int(rng.random() * (highest - lowest)) + _pick(rng, (0.0, 0.49, 0.95, 0.99))
    named = " ".join(text.title() for text in (attributes[0], material, kind))
    names = _some(rng, department.options, min(2, len(department.options)))
    options = {name: _offer(rng, department.options[name]) for name in names}
    product = Product(
        asin=_id("standard", kind, number),
        title=f"{brand} {named} for {use.title()}, {attributes[1].title()}",
        description=(
            f"A {kind} by {brand}, made with {material}. It is {_join(attributes)}, and meant for {use}."
        ),
        bullets=(
            f"{material.capitalize()}: chosen for {use}.",
            *(f"{attribute.capitalize()}, so that the {kind} stays a pleasure." for attribute in attributes),
        ),
        price_tag=f"${price}",
        prices=(price,),
        options=options,
        attributes=(*attributes, material),
        category=department.name,
        query=kind,
        product_category=_PATH.join((department.path, shelf, kind.title())),
    )
    combinations = list(itertools.product(*options.values()))
    wanted = _some(rng, combinations, min(_GOALS_PER_PRODUCT, len(combinations)))
    return product, [_standard_goal(rng, product, material, kind, values) for values in wanted]


def _standard_goal(
    rng: random.Random, product: Product, material: str, kind: str, values: tuple[str, ...]
) -> Goal:
    attributes = _some(rng, product.attributes[:-1], 1 + int(rng.random() * 3))
    wording = _pick(rng, words.OPTION_WORDINGS)
    said = [wording.format(name=name, value=v) for name, v in zip(product.options, values, strict=True)]
    limit = _LIMIT_STEP * (product.prices[0] // _LIMIT_STEP + 1 + int(rng.random() * 3))
    instruction = _pick(rng, words.WORDINGS).format(
        a=_join(attributes),
        k=kind,
        m=material,
        o=f", {_join(said)}" if said else "",
        p=_pick(rng, words.PRICE_WORDINGS).format(limit=limit),
    )
    return _make_goal(product, instruction, (*attributes, material), limit, values)


def _offer(rng: random.Random, values: Sequence[str]) -> tuple[str, ...]:
    return tuple(_some(rng, values, min(len(values), 3 + int(rng.random() * 4))))


def _join(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
