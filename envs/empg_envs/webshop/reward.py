"""WebShop's reward of a purchase.

r = r_type * (n_att + n_opt + [price <= limit]) / (|attributes| + |options| + 1)

Source: Yao et al., "WebShop", NeurIPS 2022, section 4.1 and appendix. If paper and original code differ, this
module follows the code, including its quirks. For example, a wanted option that is a (name, value) pair is
compared by its printed form, so that "large" satisfies ("size", "3x-large").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from empg_envs.webshop.fuzzy import token_set_ratio
from empg_envs.webshop.schema import CATEGORY_MARK, Goal, Product
from empg_envs.webshop.tagger import Tagger

_ALIKE = 85  # a fuzzy score above this is a match
# The color words of the original's table (princeton-nlp/WebShop, MIT). A value is reduced to the first of
# these words that occurs in it.
_COLORS = (
    *("alabaster", "apricot", "aqua", "ash", "asphalt", "azure", "banana", "beige", "black", "blue"),
    *("blush", "bordeaux", "bronze", "brown", "burgundy", "camel", "camo", "caramel", "champagne"),
    *("charcoal", "cheetah", "chestnut", "chocolate", "christmas", "coffee", "cognac", "copper", "coral"),
    *("cranberry", "cream", "crystal", "dark", "denim", "eggplant", "elephant", "espresso", "fuchsia"),
    *("gold", "granite", "grape", "graphite", "grass", "gray", "green", "grey", "heather", "indigo"),
    *("ivory", "ivy", "khaki", "lavender", "lemon", "leopard", "light", "lilac", "lime", "magenta"),
    *("maroon", "mauve", "merlot", "midnight", "mint", "mocha", "multicolor", "mushroom", "mustard"),
    *("natural", "navy", "nude", "olive", "orange", "peach", "pewter", "pink", "plum", "purple", "rainbow"),
    *("red", "rose", "royal", "rust", "sand", "sapphire", "seashell", "silver", "skull", "slate", "steel"),
    *("stone", "stonewash", "sunflower", "tan", "taupe", "teal", "tiger", "turquoise", "violet", "walnut"),
    *("wheat", "white", "wine", "yellow"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Reward:
    """A reward and its parts.

    Attributes:
      total: the reward in [0, 1].
      type_factor: r_type.
      title_score: share of the nouns in the goal's title that occur in the bought product's title.
      attributes, options: number of wanted attributes and options that are met.
      price: whether the price is within the limit.
    """

    total: float
    type_factor: float
    title_score: float
    attributes: int
    options: int
    price: bool


def compute_reward(
    goal: Goal, bought: Product, price: float, chosen: Iterable[str], tagger: Tagger
) -> Reward:
    """Compute the reward of buying ``bought`` at ``price`` dollars with the ``chosen`` option values."""
    type_factor, title_score = _compare_types(goal, bought, tagger)
    attributes = sum(_has_attribute(bought, attribute) for attribute in goal.attributes)
    options = _count_options(tuple(chosen), goal.options)
    fits = price <= goal.price_upper
    share = (attributes + options + fits) / (len(goal.attributes) + len(goal.options) + 1)
    return Reward(share * type_factor, type_factor, title_score, attributes, options, fits)


def _compare_types(goal: Goal, bought: Product, tagger: Tagger) -> tuple[float, float]:
    wanted, found = tagger.nouns(goal.title), tagger.nouns(bought.title)
    title_score = len({*wanted} & {*found}) / len(wanted) if wanted else 0.2
    if title_score == 0.0:
        return 0.0, title_score
    if title_score < 0.1:
        return 0.1, title_score
    same_query = bought.query == goal.query
    shared = _categories(bought.product_category) & _categories(goal.product_category)
    is_alike = same_query or len(shared) >= 2 or title_score > 0.2
    return 1.0 if is_alike else 0.5, title_score


def _categories(path: str) -> set[str]:
    return {part.strip() for part in path.split(CATEGORY_MARK)}


def _has_attribute(product: Product, wanted: str) -> bool:
    if any(token_set_ratio(known, wanted) > _ALIKE for known in product.attributes):
        return True
    texts = (product.title, " ".join(product.bullets), product.description)
    return any(wanted in text.lower() for text in texts)


def _count_options(chosen: tuple[str, ...], wanted: Iterable[str | tuple[str, str]]) -> int:
    found = [_first_color(value) for value in chosen]
    return sum(
        any(token_set_ratio(value, goal) > _ALIKE for value in found) for goal in map(_first_color, wanted)
    )


def _first_color(value: str | tuple[str, str]) -> str | tuple[str, str]:
    return next((color for color in _COLORS if color in value), value)
