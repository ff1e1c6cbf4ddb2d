"""Bursts dispatched before the last one is read change when responses are known, and nothing else."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empg_jax.engine.engine import Engine, EngineConfig
from empg_jax.models.decoder import DecoderConfig
from tests.weights import make_weights

MODEL = DecoderConfig(
    vocab_size=40, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=32
)
SIZES = EngineConfig(
    slots=4,
    max_tokens=96,
    max_response_tokens=24,
    stop_ids=(38, 39),
    burst=4,
    prefill_buckets=(8,),
    row_buckets=(4,),
    cache_buckets=(96,),
)


def make(ahead=True, **sizes):
    engine = Engine(MODEL, dataclasses.replace(SIZES, ahead=ahead, **sizes), seed=3)
    engine.load(make_weights(MODEL), 0)
    return engine


def read(response):
    return (response.slot, response.finish_reason, response.tokens.tolist(), response.logprobs.tolist())


def play(engine, moves):
    """Follows the moves; returns responses by (slot, turn), the turns dropped, and how many each slot had."""
    found, dropped = {}, set()
    turns, wanted, busy = ([0] * SIZES.slots for _ in range(3))

    def step():
        for response in engine.step():
            found[response.slot, turns[response.slot]] = read(response)
            busy[response.slot] = False
        for slot in range(SIZES.slots):
            submit(slot)

    def submit(slot):
        if not busy[slot] and turns[slot] < wanted[slot]:
            turns[slot] += 1
            tokens = [1 + slot, 2, 3, turns[slot] % 30]
            engine.submit(slot, tokens, is_fresh=True, ids=(0, slot, 0, turns[slot]))
            busy[slot] = True

    for slot, action in moves:
        if action == "step":
            step()
        elif action == "release" and busy[slot]:
            engine.release(slot)
            dropped.add((slot, turns[slot]))
            busy[slot] = False
        elif action == "ask":
            wanted[slot] += 1
            submit(slot)
    while any(busy) or turns != wanted:
        step()
    assert not engine.has_work
    return found, dropped, turns


MOVES = st.lists(
    st.tuples(st.integers(0, SIZES.slots - 1), st.sampled_from(["ask", "ask", "step", "step", "release"])),
    max_size=40,
)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(MOVES)
def test_any_order_of_requests_gives_the_same_responses(moves):
    ahead, dropped, turns = play(make(), moves)
    behind, also_dropped, _ = play(make(ahead=False), moves)
    every = {(slot, n) for slot, count in enumerate(turns) for n in range(1, count + 1)}
    assert ahead.keys() | dropped == behind.keys() | also_dropped == every
    for key in ahead.keys() & behind.keys():
        assert ahead[key] == behind[key]


def test_the_next_burst_is_dispatched_before_the_last_one_is_read(monkeypatch):
    engine = make(stop_ids=(-1,))
    order, decode = [], engine._decode
    monkeypatch.setattr(engine, "_decode", lambda *args: order.append("dispatch") or decode(*args))
    take = engine._slots.record
    monkeypatch.setattr(engine._slots, "record", lambda *args: order.append("read") or take(*args))
    for slot in range(SIZES.slots):
        engine.submit(slot, [1, 2, 3], is_fresh=True, ids=(0, slot, 0, 0))
    while engine.has_work:
        engine.step()
    # 24 tokens are six bursts of four; the last one has none behind it.
    assert order == ["dispatch", *["dispatch", "read"] * 5, "read"]


def test_short_responses_are_read_at_once():
    engine = make(stop_ids=(-1,))
    for slot in range(SIZES.slots):
        engine.submit(slot, [1, 2, 3], is_fresh=True, ids=(0, slot, 0, 0), max_response=4)
    assert len(engine.step()) == SIZES.slots and not engine.has_work


@pytest.mark.parametrize("ahead", [True, False])
def test_a_conversation_goes_on_after_a_burst_in_flight(ahead):
    """Kept keys, cut conversations and new weights, with a burst under way for the neighbors."""
    engine = make(stop_ids=(-1,), ahead=ahead)
    engine.submit(1, [5, 6], is_fresh=True, ids=(0, 1, 0, 0))
    engine.submit(0, [1, 2, 3], is_fresh=True, ids=(0, 0, 0, 0), max_response=6)
    responses = []
    while not responses:
        responses = engine.step()
    engine.submit(0, [7], is_fresh=False, ids=(0, 0, 0, 1), max_response=5)
    while engine.has_work:
        responses += engine.step()
    whole = make(stop_ids=(-1,), ahead=False)
    (first,) = [r for r in responses if r.slot == 0 and len(r.tokens) == 6]
    prompt = [1, 2, 3, *first.tokens.tolist(), 7]
    whole.submit(0, prompt, is_fresh=True, ids=(0, 0, 0, 1), max_response=5)
    (expected,) = whole.step() + whole.step()
    (second,) = [r for r in responses if r.slot == 0 and len(r.tokens) == 5]
    assert second.prompt_tokens.tolist() == prompt
    assert second.tokens.tolist() == expected.tokens.tolist()
    np.testing.assert_allclose(second.logprobs, expected.logprobs, atol=1e-5)


def test_versions_are_those_of_the_burst_that_sampled():
    engine = make(stop_ids=(-1,))
    engine.submit(0, [1, 2, 3], is_fresh=True, ids=(0, 0, 0, 0))
    engine.step()
    engine.step()  # one burst is read, one is in flight
    engine.swap(engine.place(make_weights(MODEL, 1)), 1, keep_cache=True)
    responses = []
    while engine.has_work:
        responses += engine.step()
    assert responses[0].versions.tolist() == [0] * 8 + [1] * 16


def test_a_cache_dropped_under_a_burst_in_flight_is_computed_anew():
    engine, other = make(stop_ids=(-1,)), make(stop_ids=(-1,), ahead=False)
    for each in (engine, other):
        each.submit(0, [1, 2, 3], is_fresh=True, ids=(0, 0, 0, 0))
        each.step()
    engine.step()
    engine.drop_cache()
    other.drop_cache()
    (response,), (expected,) = ([*_drain(each)] for each in (engine, other))
    assert response.tokens.tolist() == expected.tokens.tolist()
    np.testing.assert_allclose(response.logprobs, expected.logprobs, atol=1e-5)


def _drain(engine):
    while engine.has_work:
        yield from engine.step()
