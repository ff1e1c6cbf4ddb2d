"""Embedded worlds: a question about a chain of links, and a small corpus that contains the links.

Every task has its own world. All worlds share their names but not their facts: somebody's mother differs from
world to world. A policy can therefore not memorize facts, and the closed vocabulary suits a small tokenizer.

One search is never enough to answer. The world's index ignores the words for relations, so that a search
finds only passages that mention a name in the query. The question contains one name, the start of its chain.
The answer occurs on one page only, the page of the last thing before it, and this page does not mention the
start. No query of the question's words therefore finds the answer.

Panels: the hash of a world decides whether it belongs to train, valid or test. Some chains of relations never
occur in these three panels; they form ``test_ood``, the out-of-domain panel.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import operator
from collections.abc import Iterator

from empg_envs.deepsearch.questions import Question
from empg_envs.deepsearch.tables import KIND_OF_VALUE, LEVELS, NAMES, RELATIONS, Level
from empg_envs.draw import Draw

SPLITS = ("train", "valid", "test", "test_ood")
_TASKS = {"valid": 256, "test": 512, "test_ood": 256}
_SHARES = {"train": (0.0, 0.8), "valid": (0.8, 0.9), "test": (0.9, 1.0)}
_OOD_SHARE = 0.2
_MAX_ATTEMPTS = 10_000


@dataclasses.dataclass(frozen=True, slots=True)
class Puzzle:
    """A world with its question.

    Attributes:
      start: the name in the question, where the chain starts.
      relations: the links to follow, in this order.
      pages: thing -> its facts (relation -> value), in the order of the corpus.
      content_hash: hash of the fields above.
    """

    start: str
    relations: tuple[str, ...]
    pages: dict[str, dict[str, str]]
    content_hash: str

    @property
    def chain(self) -> list[str]:
        """The things on the chain: start, ..., answer."""
        things = [self.start]
        for relation in self.relations:
            things.append(self.pages[things[-1]][relation])
        return things

    def to_question(self, split: str, index: int, text: str) -> Question:
        """Return the question as a `Question`; its group is the number of links to follow."""
        hops = len(self.relations)
        return Question(
            id=f"{split}-{index}",
            text=text,
            golden_answers=(self.chain[-1],),
            group=f"{hops}-hop",
            metadata={"type": "bridge", "hops": hops, "supporting_titles": self.chain[:-1]},
        )


def num_tasks(level: Level, split: str) -> int:
    """Return the size of a panel.

    Raises:
      ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    return _TASKS.get(split, level.train_tasks)


def make_puzzle(level: Level, split: str, index: int) -> Puzzle:
    """Generate task ``index`` of a panel.

    Raises:
      ValueError: unknown split.
      IndexError: index outside the panel.
      TypeError: index is not an integer.
    """
    count = num_tasks(level, split)
    index = operator.index(index)
    if not 0 <= index < count:
        raise IndexError(f"task index {index} of split {split!r} is outside [0, {count})")
    for attempt in range(_MAX_ATTEMPTS):
        puzzle = _attempt(level, split, Draw("deepsearch", level.name, split, index, attempt))
        if split == "test_ood" or split_of(puzzle.content_hash) == split:
            return puzzle
    raise AssertionError(f"level {level.name!r} has no content for {split} task {index}")


def split_of(content_hash: str) -> str:
    """Return the in-domain split of a world; it is the same in every level."""
    share = int(content_hash[:8], 16) / 2**32
    return next(split for split, (low, high) in _SHARES.items() if low <= share < high)


@functools.lru_cache(maxsize=64)
def panel_hash(level_name: str, split: str) -> str:
    """Return the hash of the ordered content hashes of a panel: the panel's identity."""
    level = LEVELS[level_name]
    digest = hashlib.sha256()
    for index in range(num_tasks(level, split)):
        digest.update(make_puzzle(level, split, index).content_hash.encode())
    return digest.hexdigest()


def names_of(level: Level) -> dict[str, tuple[str, ...]]:
    """Return the names that a level uses, by kind."""
    return {kind: names[: round(len(names) * level.share)] for kind, names in NAMES.items()}


@functools.lru_cache(maxsize=64)
def paths(hops: int, is_held_out: bool) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the kind of the start and the relations of every chain with this number of links.

    ``is_held_out`` selects the chains of ``test_ood``, or all others.
    """

    def extend(kind: str, left: int) -> Iterator[tuple[str, ...]]:
        if left == 0:
            yield ()
            return
        for relation, value in RELATIONS[kind].items():
            for rest in extend(value, left - 1):
                yield (relation, *rest)

    found = [(kind, path) for kind in RELATIONS for path in extend(kind, hops)]
    return tuple((kind, path) for kind, path in found if _is_held_out(path) == is_held_out)


def _is_held_out(path: tuple[str, ...]) -> bool:
    digest = hashlib.sha256(" ".join(path).encode()).hexdigest()
    return int(digest[:8], 16) / 2**32 < _OOD_SHARE


def _attempt(level: Level, split: str, draw: Draw) -> Puzzle:
    """Return one random world with its question."""
    options = paths(draw.between(level.hops), split == "test_ood")
    kind, relations = options[draw.below(len(options))]
    names = names_of(level)
    kinds = [kind, *(KIND_OF_VALUE[relation] for relation in relations)]
    shuffled = {kind: draw.sample(names[kind], len(names[kind])) for kind in names}
    chain = [shuffled[kind].pop() for kind in kinds]
    # The other pages use only the remaining names, so that nothing of the chain occurs there by chance.
    others = {kind: tuple(left) for kind, left in shuffled.items()}
    facts = {
        thing: _facts(level, kinds[place], thing, others, draw, {relations[place]: chain[place + 1]})
        for place, thing in enumerate(chain[:-1])
    }
    _add_other_pages(level, facts, others, list(zip(chain[:-1], kinds[:-1], strict=True)), draw)
    order = draw.sample(list(facts), len(facts))
    pages = {thing: facts[thing] for thing in order}
    content = [chain[0], relations, pages]
    content_hash = hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
    return Puzzle(chain[0], relations, pages, content_hash)


def _add_other_pages(
    level: Level,
    facts: dict[str, dict[str, str]],
    others: dict[str, tuple[str, ...]],
    way: list[tuple[str, str]],
    draw: Draw,
) -> None:
    """Add pages outside of the chain.

    Things that the chain's pages mention get their pages first, so that wrong turns also lead to a page.
    """
    kind_of = {name: kind for kind, names in others.items() for name in names}
    mentioned = [value for page in facts.values() for value in page.values() if value in kind_of]
    rest = draw.sample(list(kind_of), len(kind_of))
    todo = list(dict.fromkeys([*mentioned, *rest]))[: level.pages - len(facts)]
    mentions = level.mentions
    for name in reversed(todo):  # start with the most distant pages: these mention the chain
        kind = kind_of[name]
        thing, thing_kind = way[draw.below(len(way))]
        fitting = [relation for relation, value in RELATIONS[kind].items() if value == thing_kind]
        fixed = {}
        if mentions and fitting:
            fixed[fitting[draw.below(len(fitting))]] = thing
            mentions -= 1
        facts[name] = _facts(level, kind, name, others, draw, fixed)


def _facts(
    level: Level,
    kind: str,
    name: str,
    others: dict[str, tuple[str, ...]],
    draw: Draw,
    fixed: dict[str, str],
) -> dict[str, str]:
    """Return the facts of a page in random order: the fixed ones, and others with random values."""
    free = [relation for relation in RELATIONS[kind] if relation not in fixed]
    chosen = draw.sample(free, min(level.facts - len(fixed), len(free)))
    values = dict(fixed)
    for relation in chosen:
        pool = [
            value
            for value in others[KIND_OF_VALUE[relation]]
            if value != name and value not in values.values()
        ]
        values[relation] = pool[draw.below(len(pool))]
    return {relation: values[relation] for relation in draw.sample(list(values), len(values))}
