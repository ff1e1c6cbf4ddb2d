"""WebShop as a `TextEnv`, with generated shops or the original data."""

from __future__ import annotations

import functools
import logging
import operator
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from empg_envs.webshop import expert, files
from empg_envs.webshop.actions import SEARCH
from empg_envs.webshop.goals import SHUFFLE_SEED
from empg_envs.webshop.reward import Reward, compute_reward
from empg_envs.webshop.schema import Goal
from empg_envs.webshop.shop import Page, Visit
from empg_envs.webshop.tagger import TAGGERS, Tagger, make_tagger
from empg_envs.webshop.texts import PageStyle, Style, TerseStyle

if TYPE_CHECKING:
    from empg_envs.webshop.store import Store

OFFICIAL = "official"
LEVELS = ("tiny", "standard", OFFICIAL)
STYLES = ("terse", "page")
EXPERTS = {"goal": expert.choose_by_goal, "rules": expert.choose_by_rules}
TEST_GOALS, VALID_GOALS = 500, 1000  # of the official goals; only human goals have a validation panel
_log = logging.getLogger(__name__)


class Shop(NamedTuple):
    """The shop of an environment: catalog, goal positions by split, tagger, kinds of goods, page size."""

    store: Store
    panels: Mapping[str, Sequence[int]]
    tagger: Tagger
    kinds: tuple[str, ...]
    page_size: int


class WebShopEnv:
    """A shop where the agent searches a product, chooses its options and buys it.

    The reward of a purchase is WebShop's score in [0, 1]; every other step gives 0. ``info`` contains
    ``task``, ``group`` (the department of the goal's product), ``won`` (score 1.0), ``admissible``,
    ``clickables`` in page order, ``has_search``, ``tagger`` (name of the noun tagger) and ``metrics`` with
    ``task_score``, which is WebShop's score even if ``win_reward`` changes the reward, and ``tagger_NAME``
    (1), so that metrics and summaries say which tagger scored them.
    """

    threads = False  # all instances share the catalog's caches; nothing here waits, so threads gain nothing

    def __init__(
        self,
        level: str = "tiny",
        *,
        style: str | None = None,
        max_turns: int | None = None,
        win_reward: float | None = None,
        expert: str | None = None,
        tagger: str = "auto",
        data: str | None = None,
        size: str = "small",
        goals: str = "synthetic",
        legacy_panel: bool = False,
        worker_seed: int = 0,
        fallback: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        """Set up the shop, the style and the rules.

        Args:
          level: ``tiny`` or ``standard`` (generated), or ``official`` (the original data files).
          style: ``terse`` or ``page``; the default is terse for tiny and page for the others.
          max_turns: number of steps after which an episode is truncated; the default is 8 for tiny, else 15.
          win_reward: reward of a perfect purchase, where all others give 0; None gives the score as reward.
          expert: ``goal`` (knows the product) or ``rules`` (uses only the shown texts). The default is goal
            in generated shops and rules with official data.
          tagger: ``auto``, ``spacy`` or ``tokens``; generated shops have their own list of nouns.
          data: folder of the official files; None takes ``$WEBSHOP_DATA``.
          size: ``small`` (1,000 products) or ``full``.
          goals: official goals, ``synthetic`` or ``human``.
          legacy_panel: whether to number goals by a shuffle with the seed ``worker_seed``: another fixed
            order, with panels of its own. verl-agent's fork sets that seed per worker, so that test goals of
            one worker are training goals of another.
          worker_seed: the seed of that shuffle, one for all workers.
          fallback: whether to play the standard shop if the official files are missing.
          cache_dir: folder for catalogs of official files.

        Raises:
          ValueError: an option has an unknown value.
          MissingData: official files are missing, and ``fallback`` is not set.
        """
        _check("level", level, LEVELS)
        _check("tagger", tagger, TAGGERS)
        if level != OFFICIAL:
            _check_unused(data=(data, None), size=(size, "small"), goals=(goals, "synthetic"))
            _check_unused(legacy_panel=(legacy_panel, False), tagger=(tagger, "auto"))
            _check_unused(
                worker_seed=(worker_seed, 0), fallback=(fallback, False), cache_dir=(cache_dir, None)
            )
        if max_turns is not None and max_turns < 1:
            raise ValueError(f"webshop max_turns must be at least 1, not {max_turns}")
        self._files = _find_files(data, size, goals, fallback) if level == OFFICIAL else None
        if self._files is None and level == OFFICIAL:
            level = "standard"
        self.level = level
        self._tagger_name, self._cache_dir = tagger, cache_dir
        self._order_seed = worker_seed if legacy_panel else SHUFFLE_SEED
        self._style_name = _check("style", style or ("terse" if level == "tiny" else "page"), STYLES)
        chosen = _check("expert", expert or ("rules" if level == OFFICIAL else "goal"), tuple(EXPERTS))
        self._expert = EXPERTS[chosen]
        self._max_turns = max_turns or (8 if level == "tiny" else 15)
        self._win_reward = win_reward
        self._rng = random.Random("webshop/reset/0")
        self._visit: Visit | None = None
        self._turn, self._is_done = 0, False

    @property
    def max_turns(self) -> int:
        """Number of steps after which an episode is truncated."""
        return self._max_turns

    @functools.cached_property
    def shop(self) -> Shop:
        """The shop, which is opened at its first use."""
        if self._files is None:
            from empg_envs.webshop.embedded import find_level, load_shop

            # Imported late in both branches: each kind of shop needs only its own modules.
            made = load_shop(self.level)
            return Shop(*made, find_level(self.level).page_size)
        from empg_envs.webshop import official

        store = official.load(self._files, self._cache_dir)
        held_out = TEST_GOALS + (VALID_GOALS if self._files.human is not None else 0)
        order = official.load_order(self._files, store, self._order_seed, held_out, self._cache_dir)
        panels = _divide_goals(order, held_out)
        return Shop(store, panels, make_tagger(self._tagger_name), (), 10)

    @functools.cached_property
    def _style(self) -> Style:
        if self._style_name == "page":
            return PageStyle(self.shop.store)
        return TerseStyle(self.shop.store, self.shop.kinds)

    def list_splits(self) -> list[str]:
        """Return ``train``, ``valid`` (not for official synthetic goals), ``test``."""
        return list(self.shop.panels)

    def num_tasks(self, split: str) -> int:
        """Return the number of goals of a split.

        Raises:
          ValueError: unknown split.
        """
        return len(self._panel(split))

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """Return the goal with its number in the official list and its content hash."""
        goal = self._goal(split, index)
        return {
            "level": self.level,
            "split": split,
            "index": index,
            "task": goal.instruction,
            "asin": goal.asin,
            "attributes": list(goal.attributes),
            "options": [w if isinstance(w, str) else list(w) for w in goal.options],
            "price_upper": goal.price_upper,
            "weight": goal.weight,
            "content_hash": goal.content_hash(),
        }

    def describe(self) -> dict[str, Any]:
        """Return facts for reports: catalog, skipped rows, tagger, seed of the order of goals."""
        meta = self.shop.store.meta
        return {
            "level": self.level,
            "tagger": self.shop.tagger.name,
            "shuffle_seed": self._order_seed if self.level == OFFICIAL else None,
            **{key: meta[key] for key in ("products", "goals", "skipped", "skipped_rows")},
        }

    def reset(
        self, seed: int | None = None, *, split: str | None = None, index: int | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode.

        Args:
          seed: seeds the random choice of an index, for resets without ``index``.
          split: the panel; the default is ``train``.
          index: index of the goal in its panel.

        Raises:
          ValueError: the split is unknown.
          IndexError: the index is outside of the panel.
        """
        if seed is not None:
            self._rng = random.Random(f"webshop/reset/{seed}")
        split = "train" if split is None else split
        if index is None:
            index = int(self._rng.random() * self.num_tasks(split))
        self._visit = Visit(self.shop.store, self._goal(split, index), self.shop.page_size)
        self._turn, self._is_done = 0, False
        return self._style.render(self._visit, None), self._info(self._visit, 0.0)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Carry out one action; any other text has no effect and costs the turn.

        Raises:
          RuntimeError: before the first reset, or after the end of the episode.
        """
        visit = self._playing("step")
        name, argument = self._style.read(action, visit)
        if name == SEARCH:
            visit.search(argument)
        elif name:
            visit.click(argument)
        self._turn += 1
        result = self._pay(visit) if visit.page is Page.DONE else None
        score = result.total if result else 0.0
        truncated = result is None and self._turn >= self._max_turns
        self._is_done = result is not None or truncated
        reward = score if self._win_reward is None else self._win_reward * (score == 1.0)
        observation = self._style.render(visit, result)
        return observation, float(reward), result is not None, truncated, self._info(visit, score)

    def expert_action(self) -> str:
        """Return the expert's next action.

        Raises:
          RuntimeError: before the first reset, or after the end of the episode.
        """
        visit = self._playing("expert_action")
        return self._style.write(self._expert(visit, self.shop.store), visit)

    def close(self) -> None:
        """End the episode. The catalog stays open, because other environments of the process share it."""
        self._visit = None

    def _pay(self, visit: Visit) -> Reward:
        assert visit.product is not None
        price = self.shop.store.price(visit.product.asin)
        return compute_reward(visit.goal, visit.product, price, visit.chosen.values(), self.shop.tagger)

    def _playing(self, caller: str) -> Visit:
        if self._visit is None:
            raise RuntimeError(f"{caller}() without an episode: call reset() first")
        if self._is_done:
            raise RuntimeError(f"{caller}() after the episode ended: call reset() first")
        return self._visit

    def _panel(self, split: str) -> Sequence[int]:
        panels = self.shop.panels
        if split not in panels:
            raise ValueError(f"unknown webshop split {split!r}; the splits are {', '.join(panels)}")
        return panels[split]

    def _goal(self, split: str, index: int) -> Goal:
        panel, index = self._panel(split), operator.index(index)
        if not 0 <= index < len(panel):
            raise IndexError(f"task index {index} of split {split!r} is outside [0, {len(panel)})")
        return self.shop.store.goal(panel[index])

    def _info(self, visit: Visit, score: float) -> dict[str, Any]:
        return {
            "task": visit.goal.instruction,
            "group": visit.goal.department,
            "won": score == 1.0,
            "admissible": sorted(set(self._style.admissible(visit))),
            "clickables": visit.clickables(),
            "has_search": visit.page is Page.SEARCH,
            "tagger": self.shop.tagger.name,
            "metrics": {"task_score": score, f"tagger_{self.shop.tagger.name}": 1.0},
        }


def _check(option: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"unknown webshop {option} {value!r}; choose one of {', '.join(known)}")
    return value


def _find_files(data: str | None, size: str, goals: str, fallback: bool) -> files.Files | None:
    """Return the official files, or None if they are missing and ``fallback`` is set."""
    try:
        return files.find_files(data, size, goals)
    except files.MissingData as error:
        if not fallback:
            raise
        _log.warning("%s; playing the generated shop 'standard' instead, as asked", error)
        return None


def _check_unused(**options: tuple[object, object]) -> None:
    """Refuse options of official data that differ from their defaults; each is a pair (value, default)."""
    for name, (value, default) in options.items():
        if value != default:
            raise ValueError(f"webshop option {name}={value!r} has an effect with level={OFFICIAL!r} only")


def _divide_goals(order: Sequence[int], held_out: int) -> dict[str, Sequence[int]]:
    """Return the goal positions of each panel.

    Goals 0 to 499 are for testing. The next 1,000 human goals are for validation. The rest is for training.
    """
    panels = {"train": order[held_out:], "valid": order[TEST_GOALS:held_out], "test": order[:TEST_GOALS]}
    return {split: panel for split, panel in panels.items() if len(panel)}
