"""Products and goals, and the official loader's conversion of raw rows.

A raw row is an entry of ``items_shuffle*.json`` with its entries in ``items_ins_v2*.json`` (attributes,
synthetic instruction) and ``items_human_ins.json`` (human instructions). The rules are those of WebShop's
text mode. Fields that the simulator never reads are left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

CATEGORY_MARK = "\u203a"  # separates the parts of a category path
NO_ATTRIBUTES = ("DUMMY_ATTR",)
DEFAULT_PRICE = 100.0
HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair
_MAX_ID = 10  # rows with longer ids are not products
_TEXTS = ("name", "full_description", "product_category", "category", "query")


class BadRow(ValueError):
    """A catalog row that cannot become a product. The message gives the reason."""


@dataclasses.dataclass(frozen=True, slots=True)
class Product:
    """One product, with the fields that pages, search and reward use.

    Attributes:
      asin: id, at most ten characters.
      title, description: texts of the item page and its sub-page.
      bullets: paragraphs of the features sub-page.
      price_tag: price text on pages, for example ``$1.99 to $8.99``.
      prices: one price in dollars, or the two ends of a range.
      options: option name -> its values, in page order.
      attributes: attributes that the reward compares with those of the goal.
      category, query: department of the product, and the query by which it was collected.
      product_category: path of categories separated by `CATEGORY_MARK`.
    """

    asin: str
    title: str
    description: str
    bullets: tuple[str, ...]
    price_tag: str
    prices: tuple[float, ...]
    options: Mapping[str, tuple[str, ...]]
    attributes: tuple[str, ...]
    category: str
    query: str
    product_category: str

    def search_text(self) -> str:
        """Return the indexed text: title, description, first bullet and options in lower case."""
        options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in self.options.items())
        return " ".join([self.title, self.description, *(self.bullets[:1] or ("",)), options]).lower()

    def to_json(self) -> str:
        """Return a compact JSON record for `product_from_json`."""
        return _to_json(self)


def product_from_json(record: str) -> Product:
    """Parse a record of `Product.to_json`."""
    fields = json.loads(record)
    for name in ("bullets", "prices", "attributes"):
        fields[name] = tuple(fields[name])
    fields["options"] = {name: tuple(values) for name, values in fields["options"].items()}
    return Product(**fields)


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """One shopping task.

    Attributes:
      asin: the product that the instruction was written for.
      instruction: the task sentence.
      attributes: wanted attributes of the bought product.
      price_upper: highest acceptable price in dollars; a million if the instruction names none.
      options: wanted option values. Those of a synthetic goal are (name, value) pairs, which the official
        reward compares as pairs.
      title, query, product_category: fields of the product, for the comparison of types.
      weight: relative frequency with which the original simulator draws the goal.
    """

    asin: str
    instruction: str
    attributes: tuple[str, ...]
    price_upper: float
    options: tuple[str, ...] | tuple[tuple[str, str], ...]
    title: str
    query: str
    product_category: str
    weight: float = 1.0

    @property
    def department(self) -> str:
        """The first category of the product; ``none`` where its data name none."""
        return self.product_category.partition(CATEGORY_MARK)[0].strip() or "none"

    def content_hash(self) -> str:
        """Return the hash of the task: product, task sentence and requirements of the purchase."""
        content = [self.asin, self.instruction, self.attributes, self.price_upper, self.options]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def to_json(self) -> str:
        """Return a compact JSON record for `goal_from_json`."""
        return _to_json(self)


def goal_from_json(record: str) -> Goal:
    """Parse a record of `Goal.to_json`."""
    fields = json.loads(record)
    fields["attributes"] = tuple(fields["attributes"])
    fields["options"] = tuple(tuple(o) if isinstance(o, list) else o for o in fields["options"])
    return Goal(**fields)


def _to_json(record: Product | Goal) -> str:
    # Not dataclasses.asdict, which makes deep copies of all values and takes three times as long.
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return json.dumps(fields, separators=(",", ":"))  # in ASCII, because SQLite takes no half of a character


def read_product(row: Any, attributes: Any) -> Product:
    """Build a product from a raw row by the official loader's rules.

    Args:
      row: an entry of the product file.
      attributes: its entry in the attribute file, or None.

    Raises:
      BadRow: a field is missing or of the wrong type.
    """
    if not isinstance(row, dict):
        raise BadRow(f"a row must be an object, not {type(row).__name__}")
    asin = row.get("asin")
    if not isinstance(asin, str) or not asin or asin == "nan" or len(asin) > _MAX_ID or HALF.search(asin):
        raise BadRow(f"field 'asin' must be an id of 1 to {_MAX_ID} characters, not {asin!r}")
    for name in _TEXTS:
        if not isinstance(row.get(name), str):
            raise BadRow(f"field {name!r} must be a text, not {row.get(name)!r}")
    bullets = row.get("small_description")
    if not _is_texts(bullets) and not isinstance(bullets, str):
        raise BadRow(f"field 'small_description' must be a text or a list of texts, not {bullets!r}")
    prices, tag = _read_price(row.get("pricing"))
    if attributes is not None and not isinstance(attributes, dict):
        raise BadRow(f"the entry in the attribute file must be an object, not {attributes!r:.80}")
    known = attributes.get("attributes", NO_ATTRIBUTES) if isinstance(attributes, dict) else NO_ATTRIBUTES
    if not _is_texts(known):
        raise BadRow(f"field 'attributes' of the attribute file must be a list of texts, not {known!r}")
    return Product(
        asin=asin,
        title=row["name"],
        description=row["full_description"],
        bullets=(bullets,) if isinstance(bullets, str) else tuple(bullets or ()),
        price_tag=tag,
        prices=prices,
        options=_read_options(row.get("customization_options")),
        attributes=tuple(known),
        category=row["category"],
        query=row["query"].lower().strip(),
        product_category=row["product_category"],
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def _read_price(pricing: Any) -> tuple[tuple[float, ...], str]:
    if not pricing:
        return (DEFAULT_PRICE,), f"${DEFAULT_PRICE}"
    if not isinstance(pricing, str):
        raise BadRow(f"field 'pricing' must be a text such as '$9.99', not {pricing!r}")
    try:
        prices = tuple(float(re.sub(r"[^\d.]", "", part)) for part in pricing.split("$")[1:])
    except ValueError:
        prices = ()
    if not prices:
        raise BadRow(f"field 'pricing' must hold prices such as '$9.99 $12.50', not {pricing!r}")
    if len(prices) == 1:
        return prices, f"${prices[0]}"
    return prices[:2], f"${prices[0]} to ${prices[1]}"


def _read_options(raw: Any) -> dict[str, tuple[str, ...]]:
    if not raw:
        return {}
    if not isinstance(raw, dict):
        raise BadRow(f"field 'customization_options' must be an object, not {raw!r}")
    options = {}
    for name, contents in raw.items():
        if contents is None:
            continue
        try:
            values = tuple(content["value"].strip().replace("/", " | ").lower() for content in contents)
        except (TypeError, KeyError, AttributeError):
            raise BadRow(
                f"option {name!r} must be a list of objects with a text 'value', not {contents!r}"
            ) from None
        options[name.lower()] = values
    return options
