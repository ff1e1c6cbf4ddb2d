"""Pages of a pool: none is lost, none written by two, and every response comes, however small the pool is."""

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empg_jax.engine.engine import EngineConfig
from empg_jax.engine.pages import Pages
from tests.engine.token_pool import answer, make_engine

SLOTS, SIZE, LONGEST = 4, 4, 22

# ---------------------------------------------------------------------------------------- the table

CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["write"] * 3 + ["share", "share", "cut", "drop"]),
        st.integers(0, SLOTS - 1),
        st.integers(0, SLOTS - 1),
        st.integers(0, LONGEST),
    ),
    max_size=40,
)


def check_pages(pages):
    """Every page is free, or used by as many slots as it says."""
    used = collections.Counter(page for held in pages._lists for page in held)
    assert all(len(set(held)) == len(held) for held in pages._lists)
    assert [used[page] for page in range(len(pages._users))] == pages._users.tolist()
    assert sorted(pages._free) == [page for page in range(len(pages._users)) if not used[page]]
    assert pages.counts.tolist() == [len(held) for held in pages._lists]


@settings(max_examples=60, deadline=None)
@given(st.integers(6, 20), CHANGES)
def test_each_slot_reads_what_it_wrote_or_shares(num_pages, changes):
    pages, pool = Pages(num_pages, SIZE, SLOTS), np.zeros((num_pages, SIZE), int)
    held: list[list[int]] = [[] for _ in range(SLOTS)]
    for number, (change, slot, other, rows) in enumerate(changes):
        if change == "write" and rows:
            start = min(len(held[slot]), rows // 2)
            if pages.num_needed(slot, start, rows) > pages.num_free:
                with pytest.raises(ValueError, match="are free"):
                    pages.claim(slot, start, rows, start)
                continue
            free = pages.num_free
            needed = pages.num_needed(slot, start, rows) if start < rows else 0
            moves = pages.claim(slot, start, rows, start)
            assert free - pages.num_free <= needed and len(moves) <= 1
            for page, copy in moves:
                pool[copy] = pool[page]
            for row in range(start, rows):
                pool[pages._lists[slot][row // SIZE], row % SIZE] = 100 * number + row
            held[slot] = held[slot][:start] + [100 * number + row for row in range(start, rows)]
        elif change == "share" and slot != other:
            count = min(rows, len(held[other]))
            pages.share(slot, other, count)
            held[slot] = held[other][:count]
        elif change == "cut":
            pages.cut(slot, rows)
            held[slot] = held[slot][:rows]
        elif change == "drop" and held[slot]:
            held[slot] = held[slot][: pages.drop_last(slot)]
        check_pages(pages)
        for which, tokens in enumerate(held):
            read = pool[pages._lists[which]].reshape(-1)[: len(tokens)]
            assert read.tolist() == tokens


def test_rows_without_pages_before_them_are_refused():
    with pytest.raises(ValueError, match="slot 1 has 0 pages of 4 rows: row 5 is too far"):
        Pages(4, 4, 2).claim(1, 5, 6, 5)


def test_a_table_names_the_pages_of_rows_and_of_nothing():
    pages = Pages(6, 4, 2)
    pages.claim(1, 0, 9, 0)
    assert pages.table([1, 0, 2], 4).tolist() == [[0, 1, 2, 0], [0] * 4, [0] * 4]
    assert pages.table([1], 2).tolist() == [[0, 1]] and pages.use == 0.5


# ---------------------------------------------------------------------------------------- the engine

SIZES = EngineConfig(
    slots=SLOTS,
    max_tokens=64,
    max_response_tokens=12,
    stop_ids=(39,),
    burst=3,
    prefill_chunk=8,
    prefill_buckets=(4, 8),
    row_buckets=(1, 4),
    cache_buckets=(32, 64),
    page_tokens=4,
)
COMMON = list(np.random.default_rng(0).integers(0, 30, 20))
PROMPTS = [[*COMMON, 1], [*COMMON, 1], COMMON + [2] * 9, COMMON[:18] + [3] * 17, [7]]
MOVES = st.lists(
    st.tuples(
        st.integers(0, SLOTS - 1),
        st.sampled_from(
            ["ask"] * 4 + ["follow"] * 3 + ["step"] * 4 + ["cut", "release", "drop", "swap", "lend"]
        ),
        st.integers(0, len(PROMPTS) - 1),
    ),
    min_size=10,
    max_size=40,
)


class Player:
    """Plays moves on an engine and checks every response."""

    def __init__(self, engine):
        self.engine, self.held, self.count = engine, {}, 0
        self.asked: dict[int, int] = {}

    def ask(self, slot, tokens, *, is_fresh):
        if slot in self.asked or self.engine.room(slot, len(tokens), is_fresh=is_fresh) < 1:
            return
        self.count += 1
        self.asked[slot] = self.engine.room(slot, len(tokens), is_fresh=is_fresh)
        self.held[slot] = ([] if is_fresh else self.held[slot]) + list(tokens)
        self.engine.submit(slot, tokens, is_fresh=is_fresh, ids=(0, slot, self.count, 0))

    def step(self):
        for response in self.engine.step():
            slot = response.slot
            expected = answer(self.held[slot], self.asked.pop(slot), SIZES.stop_ids)
            assert response.tokens.tolist() == expected
            self.held[slot] += expected
        check_pages(self.engine._memory._pages)

    def finish(self):
        steps = 0
        while self.engine.has_work:
            self.step()
            # Each conversation alone needs fewer than 8 chunks and 12 steps.
            assert (steps := steps + 1) < 40 * SLOTS

    def play(self, slot, move, which):
        engine = self.engine
        if move == "ask":
            self.ask(slot, PROMPTS[which], is_fresh=True)
        elif move == "follow" and slot in self.held:
            self.ask(slot, PROMPTS[which][-1:] * 2, is_fresh=False)
        elif move == "step":
            self.step()
        elif move in ("cut", "release"):
            length = len(self.held.get(slot, ())) // 2 if move == "cut" else 0
            self.held[slot] = self.held.get(slot, [])[:length]
            self.asked.pop(slot, None)
            engine.cut(slot, length)
        elif move == "drop" and not engine.has_work:
            engine.drop_cache()
        elif move == "swap":
            engine._slots.age(engine._dispatched.members)  # `Engine.swap` with keep_cache=True
            if which == 0:
                engine.measure_stale_gap()
        elif move == "lend":
            with engine.lent({}, engine.version, temperature=1.0):
                other = Player(engine)
                other.ask(slot, PROMPTS[which], is_fresh=True)
                other.finish()


@pytest.mark.parametrize("ahead", [False, True])
@settings(max_examples=40, deadline=None)
@given(st.sampled_from([64, 80, 128, 256]), MOVES)
def test_every_response_comes_however_small_the_pool_is(ahead, kv_tokens, moves):
    """Of 64 tokens, one longest conversation, to 256, all of them."""
    player = Player(make_engine(dataclasses.replace(SIZES, ahead=ahead, kv_tokens=kv_tokens)))
    for move in moves:
        player.play(*move)
    player.finish()
    assert player.engine.stats.page_use <= 1


def test_the_oldest_response_waits_for_nobody():
    """It would copy what a younger one computes, for which the others leave no room."""
    sizes = {"kv_tokens": 64, "prefill_chunk": 32, "prefill_buckets": (32,)}
    player = Player(make_engine(dataclasses.replace(SIZES, **sizes)))
    task, *others = ([first] * 2 + COMMON + [first] * 8 for first in (1, 2, 3))
    for slot, prompt in ((1, task), (2, others[0]), (3, others[1]), (0, task)):
        player.ask(slot, prompt, is_fresh=True)
    player.step()
    assert len(player.engine.progress(1).tokens)
    player.finish()


def test_released_conversations_give_way_before_those_that_wait():
    """And of those that wait the newest one, from its end."""
    player = Player(make_engine(dataclasses.replace(SIZES, kv_tokens=128)))
    for slot in range(3):
        player.ask(slot, [slot + 1] * 30, is_fresh=True)
        player.finish()
    engine, table = player.engine, player.engine._slots
    player.play(0, "release", 0)
    before = table.rows.copy()
    player.ask(3, [9] * 40, is_fresh=True)
    player.finish()
    assert table.rows[0] < before[0] and (table.rows[1:3] == before[1:3]).all()
    assert engine.take_stats().evicted_tokens == before[0] - table.rows[0]
    player.ask(0, [8] * 40, is_fresh=True)
    player.finish()
    assert 0 < table.rows[3] < 40 and (table.rows[1:3] == before[1:3]).all()
