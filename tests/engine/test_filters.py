"""Top-k, top-p, min-p and watches in the engine: the learner agrees; without them, nothing changes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from empg_jax.engine.engine import Engine, EngineConfig
from empg_jax.learner.outputs import compute_outputs
from empg_jax.models.decoder import DecoderConfig
from empg_jax.models.filtering import NO_FILTER, TokenFilter
from tests.weights import make_weights

MODEL = DecoderConfig(vocab_size=60, hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8)
SIZES = EngineConfig(
    slots=5, max_tokens=64, max_response_tokens=40, stop_ids=(-1,), burst=6, prefill_buckets=(16,),
    cache_buckets=(64,), has_filter=True,
)  # fmt: skip


@functools.cache
def double_weights():
    return jax.tree.map(lambda leaf: 2 * leaf, make_weights(MODEL))


FILTERS = [NO_FILTER, TokenFilter(top_p=0.7), TokenFilter(top_k=4), TokenFilter(min_p=0.2)]
FILTERS += [TokenFilter(0.9, 12, 0.05)]
TEMPERATURE = 0.8
score = jax.jit(
    lambda token_filter, weights, *rows: compute_outputs(
        weights, MODEL, *rows, temperature=TEMPERATURE, token_filter=token_filter
    ),
    static_argnums=0,
)


def make(**sizes):
    engine = Engine(MODEL, dataclasses.replace(SIZES, **sizes), seed=0, temperature=TEMPERATURE)
    engine.load(double_weights(), 3)
    return engine


def finish(engine):
    found = {}
    while engine.has_work:
        found |= {response.slot: response for response in engine.step(is_eager=False)}
    return [found[slot] for slot in sorted(found)]


def ask(engine, slot=0, **how):
    engine.submit(slot, [1, 2, 3], is_fresh=True, ids=(0, 0, slot, 0), **how)


def score_response(response, token_filter):
    whole = np.concatenate([response.prompt_tokens, response.tokens])
    row = np.zeros((1, SIZES.max_tokens), np.int32)
    row[0, : len(whole)] = whole
    positions = np.arange(SIZES.max_tokens, dtype=np.int32)[None]
    logprobs, entropies, _ = score(token_filter, double_weights(), row, positions, np.ones_like(row))
    part = slice(len(response.prompt_tokens), len(whole))
    return np.asarray(logprobs)[0, part], np.asarray(entropies)[0, part]


@pytest.fixture(scope="module")
def together():
    """A response with each filter, all in one batch, and the compiled programs' number."""
    engine = make()
    for slot, token_filter in enumerate(FILTERS):
        ask(engine, slot, token_filter=token_filter)
    return finish(engine), engine._programs.decode._cache_size()


@pytest.mark.parametrize("slot", range(len(FILTERS)))
def test_the_learner_finds_the_log_probs_of_every_filter(together, slot):
    response = together[0][slot]
    logprobs, entropies = score_response(response, FILTERS[slot])
    # Twice the weights make large logits, whose rounding differs between processors.
    np.testing.assert_allclose(response.logprobs, logprobs, atol=6e-5)
    full, _ = score_response(response, NO_FILTER)
    np.testing.assert_allclose(response.full_logprobs, full, atol=6e-5)
    np.testing.assert_allclose(response.entropies, entropies, atol=6e-5)  # of the whole distribution
    assert together[1] == 1
    if slot:  # the filter leaves tokens out that matter
        assert (response.logprobs > response.full_logprobs + 1e-3).mean() > 0.7


def test_a_response_without_a_filter_is_the_same_bit_by_bit(together):
    plain = make(has_filter=False)
    for slot in range(5):
        ask(plain, slot)
    expected, idle = finish(plain), make()
    for slot in range(5):
        ask(idle, slot, token_filter=NO_FILTER)
    for one, other in zip(finish(idle), expected, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert one.logprobs.tobytes() == other.logprobs.tobytes() == one.full_logprobs.tobytes()
        assert one.entropies.tobytes() == other.entropies.tobytes()
    # Also beside others that have one.
    np.testing.assert_array_equal(together[0][0].tokens, expected[0].tokens)
    assert expected[0].full_logprobs is None


def test_the_filter_belongs_to_the_response():
    engine = make()
    ask(engine, 0, token_filter=TokenFilter(top_k=1))
    ask(engine, 1, temperature=0.0)
    first, greedy = finish(engine)
    np.testing.assert_array_equal(first.tokens, greedy.tokens)
    np.testing.assert_allclose(first.logprobs, 0.0, atol=1e-6)
    ask(engine, 0)
    (again,) = finish(engine)
    assert again.tokens.tolist() != first.tokens.tolist()
    with engine.lent(engine.place(double_weights()), 3, temperature=1.0, token_filter=TokenFilter(top_k=1)):
        ask(engine, 0)
        (lent,) = finish(engine)
    np.testing.assert_array_equal(lent.tokens, first.tokens)
    assert engine.token_filter == NO_FILTER


def test_a_filter_that_an_engine_cannot_use_is_refused():
    with pytest.raises(ValueError, match="needs an engine with EngineConfig"):
        ask(make(has_filter=False), token_filter=TokenFilter(top_k=1))
    with pytest.raises(ValueError, match=r"top_k=61 must lie in \[0, 60\]"):
        ask(make(), token_filter=TokenFilter(top_k=61))


# --------------------------------------------------------------------------------------------- watches


@pytest.mark.parametrize("sizes", [{}, {"burst": 1, "ahead": True}], ids=str)
def test_a_watch_ends_a_response_at_the_same_token_in_any_burst(sizes):
    engine = make(has_filter=False, **sizes)
    ask(engine)
    (free,) = finish(engine)
    wanted = free.tokens[14]
    end = free.tokens.tolist().index(wanted) + 1

    def watch(tokens):
        places = np.flatnonzero(tokens == wanted)
        return int(places[0]) + 1 if len(places) else None

    ask(engine, watch=watch)
    ask(engine, 1, max_response=30)
    engine.take_stats()
    cut, beside = finish(engine)
    assert engine.take_stats().sampled_tokens == end + 30  # those behind the end do not count
    assert cut.finish_reason == "stop" and len(beside.tokens) == 30
    np.testing.assert_array_equal(cut.tokens, free.tokens[:end])
    assert len(cut.logprobs) == len(cut.entropies) == len(cut.versions) == end
    # The conversation goes on behind the kept tokens, as a fresh one with the same tokens does.
    engine.submit(0, [7, 8], is_fresh=False, ids=(0, 0, 0, 1), max_response=5)
    engine.submit(1, [1, 2, 3, *cut.tokens, 7, 8], is_fresh=True, ids=(0, 0, 0, 1), max_response=5)
    kept, fresh = finish(engine)
    np.testing.assert_array_equal(kept.prompt_tokens, fresh.prompt_tokens)
    np.testing.assert_array_equal(kept.tokens, fresh.tokens)
    np.testing.assert_allclose(kept.logprobs, fresh.logprobs, atol=1e-5)


def test_a_response_that_ends_by_its_length_is_watched_too():
    engine = make(has_filter=False)
    ask(engine, max_response=4, watch=lambda tokens: 2 if len(tokens) >= 2 else None)
    (response,) = finish(engine)
    assert (len(response.tokens), response.finish_reason) == (2, "stop")
