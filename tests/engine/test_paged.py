"""An engine over pages samples what one over rows does, whatever happens, with less memory."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings

from empg_jax.engine.engine import Engine
from empg_jax.engine.programs import Chunk, Request
from empg_jax.models.filtering import TokenFilter
from empg_jax.parallel.mesh import make_mesh
from empg_jax.run.process import CompileCounter
from tests.engine import test_prefix
from tests.engine.caches import cache_of
from tests.engine.test_prefix import MODEL, MOVES, check_same, play, task
from tests.weights import make_weights

# Two buckets; a page ends inside of every prompt, and at the end of each bucket.
SIZES = dataclasses.replace(
    test_prefix.SIZES, prefill_buckets=(16,), row_buckets=(4,), cache_buckets=(48, 96), has_filter=True
)
PAGES = {"page_tokens": 16}
HALF = {"page_tokens": 16, "kv_tokens": 2 * 96}
LIKELY = TokenFilter(top_k=8)


def make(**sizes):
    engine = Engine(MODEL, dataclasses.replace(SIZES, **sizes), seed=3)
    engine.load(make_weights(MODEL), 0)
    return engine


def converse(engine, turns=4):
    """Conversations of a group and of another task, one after the other and together; all responses."""
    found = {}
    prompts = [task(0), task(0), task(1), task(0)[:30]]
    for turn in range(turns):
        for slot, prompt in enumerate(prompts):
            tokens = prompt if turn == 0 else prompt[turn : turn + 3]
            token_filter = LIKELY if slot % 2 else None
            ids = (0, slot, 0, turn)
            engine.submit(slot, tokens, is_fresh=turn == 0, ids=ids, token_filter=token_filter)
            if turn == 2:
                engine.step()
        while engine.has_work:
            found |= {(response.slot, turn): response for response in engine.step()}
    return found


def check_equal(found, expected):
    """Equal to the last bit."""
    assert found.keys() == expected.keys()
    for key, response in found.items():
        for name in ("prompt_tokens", "tokens", "logprobs", "entropies", "full_logprobs", "copied"):
            np.testing.assert_array_equal(getattr(response, name), getattr(expected[key], name))


@pytest.fixture(scope="module")
def by_rows():
    engine = make()
    return converse(engine), engine.take_stats()


@pytest.mark.slow
def test_pages_give_the_numbers_of_rows_to_the_last_bit(by_rows):
    engine = make(**PAGES)
    engine.warm_up()
    with CompileCounter() as compiles:
        found = converse(engine)
    expected, dense = by_rows
    check_equal(found, expected)
    stats = engine.take_stats()
    assert 0 < stats.page_use < 0.8 and stats.evicted_tokens == 0 and compiles.count == 0
    assert dataclasses.replace(stats, page_use=0.0) == dense


@pytest.mark.slow
def test_a_pool_of_half_the_conversations_gives_the_same_responses(by_rows):
    engine, checks = make(**HALF), []
    programs = [getattr(engine._programs, name) for name in ("prefill", "decode", "copy_pages")]
    before = sum(program._cache_size() for program in programs)
    engine.warm_up(lambda: checks.append(None))
    compiled = sum(program._cache_size() for program in programs) - before
    assert compiled == len(checks) == engine.config.num_programs == 5
    with CompileCounter() as compiles:
        found = converse(engine)
    expected, dense = by_rows
    check_same(found, expected)
    stats = engine.take_stats()
    assert stats.evicted_tokens > 0 and stats.prefilled_tokens > dense.prefilled_tokens
    assert stats.page_use == 1.0 and compiles.count == 0
    rows = sum(leaf.nbytes for leaf in jax.tree.leaves(make()._programs.new_cache(96)))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache_of(engine))) == rows / 2


@settings(max_examples=5, deadline=None)
@given(MOVES)
def test_any_order_gives_the_responses_of_rows(moves):
    """Weights published in the middle, evaluations in between, conversations that are cut and released."""
    check_same(play(make(**PAGES), moves), play(make(), moves))


@pytest.mark.parametrize("name", ["decode", "prefill", "copy_pages"])
def test_no_program_copies_the_pool(name):
    engine = make(**PAGES)
    given = (engine._params, cache_of(engine))
    pages = np.zeros((4, 3), np.int32)
    if name == "decode":
        plan, limits, ones = np.zeros((4, 8), np.int32), np.zeros(2, np.int32), np.ones(4, np.float32)
        filters = np.zeros((4, 3), np.float32)
        inputs = Request(engine._key, plan, engine._carried, limits, ones, filters, pages)
    elif name == "copy_pages":
        given, inputs = (cache_of(engine),), np.zeros((4, 2), np.int32)
    else:
        tokens, spans = np.zeros((1, 8), np.int32), np.zeros((1, 2), np.int32)
        inputs = Chunk(np.zeros(1, np.int32), tokens, spans, pages[:1])
    compiled = getattr(engine._programs, name).lower(*given, inputs).compile()
    shape = ",".join(map(str, cache_of(engine)[0][0].shape))
    copies = [line for line in compiled.as_text().splitlines() if " copy(" in line and f"[{shape}]" in line]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache_of(engine)))
    assert copies == [] and compiled.memory_analysis().alias_size_in_bytes >= size


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"kv_tokens": 96}, "kv_tokens=96 has no effect without page_tokens"),
        (
            {"page_tokens": 10, "kv_tokens": 96},
            "kv_tokens=96 does not hold one conversation of max_tokens=96",
        ),
    ],
)
def test_sizes_that_cannot_work_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SIZES, **sizes)


def test_one_pool_is_not_split_over_devices():
    with pytest.raises(ValueError, match="page_tokens=16 with slots over data=2 devices"):
        Engine(MODEL, dataclasses.replace(SIZES, **PAGES), seed=3, mesh=make_mesh(data=2))
