"""Goals of a catalog, by the original rules but with fixed seeds.

At start-up the original draws prices, then price limits, and then shuffles all goals. It fixes only the seed
of the shuffle, and a popular fork fixes no seed at all. Here one generator with the seed `PRICE_SEED` draws
prices and limits, and another one with `SHUFFLE_SEED` shuffles. A number therefore denotes the same goal in
every process, and goals 0 to 499 are always held out.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from empg_envs.webshop.schema import DEFAULT_PRICE, BadRow, Goal, Product

PRICE_SEED = 42
SHUFFLE_SEED = 233
NO_LIMIT = 1_000_000.0
_LIMITS = tuple(10.0 * step for step in range(1, 100))
_LIMITS_DRAWN = 4


def draw_price(product: Product, rng: random.Random) -> float:
    """Return the price of a purchase; if the price tag shows a range, draw a price from it."""
    if not product.prices:
        return DEFAULT_PRICE
    return product.prices[0] if len(product.prices) == 1 else rng.uniform(*product.prices[:2])


def _draw_limit(price: float, rng: random.Random) -> tuple[float, str]:
    """Draw a price limit; return it with its wording in the instruction."""
    above = [limit for limit in _LIMITS if limit > price][:_LIMITS_DRAWN]
    if len(above) < 2:
        return NO_LIMIT, ""
    limit = max(rng.sample(above, 2))
    return limit, f", and price lower than {limit:.2f} dollars"


def _texts(entry: dict[str, Any], key: str, kind: type = list) -> Any:
    value = entry.get(key)
    if not isinstance(value, kind):
        raise BadRow(f"field {key!r} of an instruction must be a {kind.__name__}, not {value!r}")
    return value


def _make(product: Product, **fields: Any) -> Goal:
    return Goal(
        asin=product.asin,
        title=product.title,
        query=product.query,
        product_category=product.product_category,
        **fields,
    )


def synthetic_goals(
    product: Product, entry: dict[str, Any], price: float, rng: random.Random
) -> Iterator[Goal]:
    """Yield a goal per combination of option values of one product.

    Args:
      product: the product.
      entry: its row of the attribute file. Without an instruction there is no goal, and nothing is drawn.
      price: the price from `draw_price`.
      rng: the generator that drew all prices.

    Raises:
      BadRow: the instruction has no attributes.
    """
    if not entry.get("instruction"):
        return
    instruction = _texts(entry, "instruction", str)
    attributes = tuple(_texts(entry, "instruction_attributes"))
    if not attributes:
        raise BadRow("field 'instruction_attributes' must not be empty beside an instruction")
    limit, limit_text = _draw_limit(price, rng)
    names = sorted(product.options)
    for values in itertools.product(*(product.options[name] for name in names)):
        # A dictionary as in the original: of two options with the same name the last value counts.
        wanted = dict(zip(names, values, strict=True))
        said = ", and ".join(f"{name}: {value}" for name, value in wanted.items())
        yield _make(
            product,
            instruction=f"{instruction}{' with ' + said if said else ''}{limit_text}",
            attributes=attributes,
            price_upper=limit,
            options=tuple(wanted.items()),
        )


def human_goals(
    product: Product, entries: Iterable[dict[str, Any]], price: float, rng: random.Random
) -> Iterator[Goal]:
    """Yield a goal per human instruction of one product; those without attributes are left out.

    Raises:
      BadRow: a field of an instruction is missing.
    """
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, dict) for entry in entries):
        raise BadRow(f"human instructions must be a list of objects, not {entries!r:.80}")
    for entry in entries:
        attributes = tuple(_texts(entry, "instruction_attributes"))
        if not attributes:
            continue
        said, options = _texts(entry, "instruction", str), _texts(entry, "instruction_options")
        limit, limit_text = _draw_limit(price, rng)
        yield _make(
            product,
            instruction=said.strip(".") + limit_text,
            attributes=attributes,
            price_upper=limit,
            options=tuple(options),
        )


def synthetic_weight(attributes: Iterable[str], counts: Counter[str]) -> float:
    """Return the weight of a synthetic goal, with which the original draws it; rare attributes weigh more."""
    shares = [1.0 / counts[attribute] for attribute in attributes]
    return sum(shares) / len(shares)


def shuffled(count: int, seed: int = SHUFFLE_SEED) -> list[int]:
    """Return the positions of goals in the order of their numbers: a ``random.shuffle`` with this seed."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
