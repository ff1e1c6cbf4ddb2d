"""A prefix that conversations share is computed once, and nothing but the work changes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empg_jax.engine.engine import Engine, EngineConfig
from empg_jax.engine.prefill import make_pairs, plan_prefill
from empg_jax.engine.slots import MIN_SHARED, Copy, Slots, count_equal
from empg_jax.models.decoder import DecoderConfig
from empg_jax.models.filtering import NO_FILTER
from empg_jax.parallel.mesh import make_mesh
from empg_jax.run.process import CompileCounter
from tests.engine.caches import cache_of
from tests.weights import make_weights

MODEL = DecoderConfig(
    vocab_size=40, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, intermediate_size=32
)
SIZES = EngineConfig(
    slots=4,
    max_tokens=96,
    max_response_tokens=8,
    stop_ids=(38, 39),
    burst=4,
    prefill_buckets=(8, 32),
    row_buckets=(1, 4),
    cache_buckets=(96,),
)
RULES = list(np.random.default_rng(0).integers(0, 38, 40))  # the instructions that all tasks begin with


def make(mesh=None, **sizes):
    engine = Engine(MODEL, dataclasses.replace(SIZES, **sizes), seed=3, mesh=mesh)
    engine.load(make_weights(MODEL), 0)
    return engine


def task(number, rules=20):
    """A prompt: ``rules`` common tokens, and 20 of its own."""
    return [*RULES[:rules], *np.random.default_rng(1 + number).integers(0, 38, 20)]


def drain(engine):
    found = {}
    while engine.has_work:
        found |= {response.slot: response for response in engine.step()}
    return found


def ask(engine, prompts, **how):
    """One response to each prompt, in the slots 0, 1, ..."""
    for slot, prompt in enumerate(prompts):
        engine.submit(slot, prompt, is_fresh=True, ids=(0, slot, 0, 0), **how)
    return drain(engine)


def check_same(found, expected):
    """Equal tokens; the numbers may differ by the rounding of programs of other shapes."""
    assert found.keys() == expected.keys()
    for key, response in found.items():
        other = expected[key]
        np.testing.assert_array_equal(response.prompt_tokens, other.prompt_tokens)
        np.testing.assert_array_equal(response.tokens, other.tokens)
        np.testing.assert_array_equal(response.versions, other.versions)
        np.testing.assert_allclose(response.logprobs, other.logprobs, atol=1e-5)
        np.testing.assert_allclose(response.entropies, other.entropies, atol=1e-5)
        assert response.finish_reason == other.finish_reason


# ------------------------------------------------------------------------------------------ the plan


def waiting(prompts, **sizes):
    """The table after prompts were submitted, the plan, and its copies and prefilled tokens by wave."""
    config = dataclasses.replace(SIZES, slots=len(prompts), **sizes)
    table = Slots(config, 1.0)
    for slot, prompt in enumerate(prompts):
        table.begin(
            slot,
            prompt,
            is_fresh=True,
            ids=(0,) * 4,
            max_response=None,
            temperature=1.0,
            token_filter=NO_FILTER,
            watch=None,
        )
    waves = plan_prefill(table, config, 96)
    tokens = [sum(group.num_tokens for group in wave.groups) for wave in waves]
    return [[(c.slot, c.donor, c.count) for c in wave.copies] for wave in waves], tokens


def test_the_first_attempt_is_prefilled_and_the_others_copy_it():
    copies, tokens = waiting([task(0)] * 4)
    assert copies == [[], [(1, 0, 39), (2, 0, 39), (3, 0, 39)]] and tokens == [39, 0]


def test_a_group_copies_its_prompt_and_other_groups_the_common_beginning():
    copies, tokens = waiting([task(0, 32), task(0, 32), task(1, 32), task(1, 32)])
    assert copies == [[], [(1, 0, 51), (2, 0, 32)], [(3, 2, 51)]] and tokens == [51, 19, 0]


def test_a_few_equal_tokens_are_not_worth_a_copy():
    copies, tokens = waiting([task(number, 15) for number in range(4)])
    assert copies == [[]] and tokens == [4 * 34]


class Counted(np.ndarray):
    """Tokens that count the comparisons with them, however many tokens each one takes."""

    count = 0

    def __array_ufunc__(self, function, method, *inputs, **options):
        Counted.count += function in (np.equal, np.not_equal)
        plain = [i.view(np.ndarray) if isinstance(i, Counted) else i for i in inputs]
        return getattr(function, method)(*plain, **options)


def test_conversations_of_one_template_are_not_compared_one_by_one(monkeypatch):
    """With all others at once, and only where something can be copied: this is the host's work of a round."""
    begin = Slots.__init__

    def count(table, *args):
        begin(table, *args)
        table._history = table._history.view(Counted)

    monkeypatch.setattr(Slots, "__init__", count)
    template = np.arange(3, 37)
    alike = [np.concatenate([[number], template]) for number in range(3, 35)]  # equal but for the first token
    for prompts, copies in ((alike, []), ([task(0)] * 32, 31), ([task(0, 8)[:16]] * 32, [])):
        Counted.count = 0
        found = waiting(prompts)[0]
        assert found == [[]] if copies == [] else len(found[1]) == copies
        assert Counted.count <= 5 * len(prompts)
    assert not Counted.count  # too short to save what a copy must


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_what_conversations_have_in_common_is_what_each_two_have(seed):
    random = np.random.default_rng(seed)
    table = Slots(dataclasses.replace(SIZES, slots=6), 1.0, NO_FILTER)
    trunk = random.integers(0, 3, 96)
    for slot in range(6):
        own = random.integers(0, 3, 96)
        table._history[slot] = np.where(np.arange(96) < random.integers(0, 97), trunk, own)
        table.num_tokens[slot] = random.integers(1, 96)
    lengths = random.integers(0, 97, 6)
    at_least = int(random.integers(MIN_SHARED, 64))
    tokens = table.tokens(0, 0, int(table.num_tokens[0]) - 1)
    each = [count_equal(table.tokens(slot, 0, int(lengths[slot])), tokens) for slot in range(6)]
    wanted = [0, *(count if count >= at_least else 0 for count in each[1:])]
    assert table.common(0, lengths, at_least).tolist() == wanted


def test_one_program_for_all_slots_takes_them_at_once_where_waiting_would_cost_more():
    """A barrier's rounds have one number of rows: two prefills of all slots are more work than one."""
    prompts = [task(number, 20) for number in range(4)]
    assert len(waiting(prompts, row_buckets=(4,), prefill_buckets=(32, 64))[0]) == 1
    assert len(waiting(prompts, row_buckets=(1, 4), prefill_buckets=(8,))[0]) == 2
    # A whole prompt costs nothing to wait for.
    twice = [prompts[0], prompts[0], prompts[1], prompts[1]]
    copies, tokens = waiting(twice, row_buckets=(4,), prefill_buckets=(32, 64))
    assert copies == [[], [(1, 0, 39), (3, 2, 39)]] and tokens == [78, 0]


def test_pairs_name_slots_inside_their_part():
    copies = [Copy(1, 0, 20, 20), Copy(6, 4, 30, 30), Copy(7, 5, 31, 31)]
    pairs = make_pairs(copies, dataclasses.replace(SIZES, slots=8, shards=2))
    assert (
        pairs[[0, 4, 5]].tolist() == [[1, 0, 20], [2, 0, 30], [3, 1, 31]] and not pairs[[1, 2, 3, 6, 7]].any()
    )


# ---------------------------------------------------------------------------------------- the engine


def test_attempts_at_one_task_cost_one_prefill():
    engine = make()
    engine.warm_up()
    with CompileCounter() as compiles:
        found = ask(engine, [task(0, 40)] * 4)
    check_same(found, ask(make(share_prefix=False), [task(0, 40)] * 4))
    assert len({tuple(response.tokens) for response in found.values()}) > 1
    stats = engine.take_stats()
    assert (stats.prefilled_tokens, stats.shared_tokens, stats.prompt_tokens) == (59, 3 * 59, 4 * 59)
    assert stats.hit_rate == 0.75 and stats.evicted_tokens == 0 and compiles.count == 0


def test_a_prefix_longer_than_one_piece_is_copied_to_the_end_of_the_cache():
    """Pieces of 128 rows, of which the last one does not fit."""
    long = np.random.default_rng(5).integers(0, 38, 290).tolist()
    sizes = {"max_tokens": 300, "cache_buckets": (300,)}
    engine = make(**sizes)
    check_same(ask(engine, [long, long]), ask(make(**sizes, share_prefix=False), [long, long]))
    assert engine.stats.shared_tokens == 289


def test_a_released_slot_gives_its_rows_until_they_are_overwritten():
    engine, other = make(), make(share_prefix=False)
    for each in (engine, other):
        ask(each, [task(0), task(1)], max_response=4)
        each.release(0)
        each.take_stats()
    for each in (engine, other):
        each.submit(2, task(0), is_fresh=True, ids=(0, 2, 0, 0))
    check_same(drain(engine), drain(other))
    assert engine.take_stats().prefilled_tokens == 0
    # Another task in its place: what it shares with the former one stays.
    engine.submit(0, task(2), is_fresh=True, ids=(0, 0, 0, 1))
    other.submit(0, task(2), is_fresh=True, ids=(0, 0, 0, 1))
    check_same(drain(engine), drain(other))
    stats = engine.take_stats()
    assert (stats.prefilled_tokens, stats.shared_tokens) == (19, 0)
    assert 20 <= stats.evicted_tokens <= 23  # the former prompt's other half, and a response of up to four


def test_without_a_live_conversation_the_cache_is_empty():
    engine = make()
    ask(engine, [task(0)])
    engine.release(0)
    engine.take_stats()
    ask(engine, [task(0)])
    assert engine.stats.hit_rate == 0.0


def test_rows_of_older_weights_are_not_copied():
    """A conversation that goes on over them is no donor; one that begins after the change is."""
    engine = make(stop_ids=(-1,))
    engine.submit(0, task(0), is_fresh=True, ids=(0, 0, 0, 0))
    engine.step()
    engine.swap(engine.place(make_weights(MODEL, 1)), 1, keep_cache=True)
    for slot in (1, 2):
        engine.submit(slot, task(0), is_fresh=True, ids=(0, slot, 0, 0))
    found = drain(engine)
    assert (engine.stats.prefilled_tokens, engine.stats.shared_tokens) == (2 * 39, 39)
    fresh = make(stop_ids=(-1,), share_prefix=False)
    fresh.load(make_weights(MODEL, 1), 1)
    for slot in (1, 2):
        fresh.submit(slot, task(0), is_fresh=True, ids=(0, slot, 0, 0))
    assert found.pop(0).versions.tolist() == [0] * 4 + [1] * 4
    check_same(found, drain(fresh))


@pytest.mark.parametrize("slot", [0, 2])
def test_weights_that_change_before_the_prefill_leave_no_older_rows_in_it(slot):
    """The prompt is in its own slot already, or in another one."""
    found = []
    for share in (True, False):
        engine = make(stop_ids=(-1,), share_prefix=share)
        ask(engine, [task(0), task(1)])
        engine.release(0)
        engine.submit(slot, task(0), is_fresh=True, ids=(0, 0, 0, 1))
        engine.swap(engine.place(make_weights(MODEL, 1)), 1, keep_cache=True)
        assert engine.measure_stale_gap() is None  # nothing of it is in the cache
        found.append(drain(engine))
    check_same(*found)


def test_new_weights_leave_no_rows():
    engine = make()
    ask(engine, [task(0)] * 2)
    engine.load(make_weights(MODEL, 1), 1)
    engine.take_stats()
    ask(engine, [task(0)] * 2)
    assert engine.stats.prefilled_tokens == 39  # the group shares again


def test_rows_are_copied_on_the_devices_that_hold_them():
    prompts = [task(0)] * 4
    engine = make(mesh=make_mesh(data=2, tensor=2))
    check_same(ask(engine, prompts), ask(make(share_prefix=False), prompts))
    assert engine.stats.prefilled_tokens == 2 * 39  # once in each half of the slots
    program = engine._programs.copy_rows.lower(cache_of(engine), np.zeros((4, 3), np.int32)).compile()
    assert not any(word in program.as_text() for word in ("all-gather", "all-reduce", "collective-permute"))


# ------------------------------------------------------------------------------------------ any order

PROMPTS = [task(0), task(0), task(1), task(0)[:30] + task(1)[:20], [5]]
ACTIONS = ["ask"] * 4 + ["step"] * 3 + ["swap"] * 2 + ["release", "cut", "follow", "load", "lend"]
MOVES = st.lists(
    st.tuples(st.integers(0, SIZES.slots - 1), st.sampled_from(ACTIONS), st.integers(0, len(PROMPTS) - 1)),
    min_size=20,
    max_size=30,
)


def play(engine, moves):
    """Follows the moves; returns the responses in their order, by the number of their request."""
    found, number, busy, swaps = {}, {}, {}, 0

    def step():
        for response in engine.step():
            found[busy.pop(response.slot)] = response

    def finish():
        while busy:
            step()

    for count, (slot, action, which) in enumerate(moves):
        if action == "step":
            step()
        elif action in ("release", "cut"):
            held = len(engine._slots.read(slot, "length").prompt_tokens) if slot in number else 0
            engine.cut(
                slot, 0 if action == "release" else min(held, int(engine._slots.num_tokens[slot])) // 2
            )
            busy.pop(slot, None)
        elif action in ("ask", "follow") and slot not in busy:
            tokens = PROMPTS[which][: len(PROMPTS[which]) if action == "ask" else 3]
            is_fresh = action == "ask"
            if engine.room(slot, len(tokens), is_fresh=is_fresh) < 1:
                continue
            engine.submit(slot, tokens, is_fresh=is_fresh, ids=(0, slot, count, 0))
            busy[slot] = number[slot] = count
        elif action == "load":
            finish()
            engine.load(make_weights(MODEL, count % 2), count)
        elif action == "swap":
            weights = make_weights(MODEL, (swaps + 1) % 2)
            swaps += 1
            engine.swap(engine.place(weights), count, keep_cache=True)
            if which == 0:
                engine.measure_stale_gap()
        elif action == "lend":
            with engine.lent(engine.place(make_weights(MODEL, which % 2)), 1000 + which % 2, temperature=1.0):
                engine.submit(slot, PROMPTS[which], is_fresh=True, ids=(1, slot, count, 0))
                found[count] = drain(engine)[slot]
    finish()
    return found


@pytest.mark.parametrize("ahead", [False, True])
@settings(max_examples=10, deadline=None)
@given(MOVES)
def test_any_order_gives_the_same_responses(ahead, moves):
    engine = make(ahead=ahead)
    check_same(play(engine, moves), play(make(ahead=ahead, share_prefix=False), moves))
