"""What a server asks of the engine: a temperature per response, and conversations that are cut back."""

import numpy as np
import pytest

from empg_jax.engine.engine import Engine, EngineConfig
from empg_jax.models.decoder import DecoderConfig
from tests.weights import make_weights

MODEL = DecoderConfig(vocab_size=60, hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8)
SIZES = EngineConfig(
    slots=3, max_tokens=64, max_response_tokens=12, stop_ids=(-1,), burst=6, prefill_buckets=(16,),
    cache_buckets=(64,),
)  # fmt: skip


@pytest.fixture
def engine():
    engine = Engine(MODEL, SIZES, seed=0)
    engine.load(make_weights(MODEL), 3)
    return engine


def answer(engine, *slots):
    found = {}
    while engine.has_work:
        found |= {response.slot: response for response in engine.step(is_eager=False)}
    return [found[slot] for slot in slots]


def test_each_response_has_its_own_temperature(engine):
    for slot, temperature in enumerate((0.0, 2.0, None)):
        engine.submit(slot, [1, 2, 3], is_fresh=True, ids=(0, 0, 0, 0), temperature=temperature)
    together = answer(engine, 0, 1, 2)
    for response, temperature in zip(together, (0.0, 2.0, 1.0), strict=True):
        other = Engine(MODEL, SIZES, seed=0, temperature=temperature)
        other.load(make_weights(MODEL), 3)
        other.submit(1, [1, 2, 3], is_fresh=True, ids=(0, 0, 0, 0))
        (alone,) = answer(other, 1)
        np.testing.assert_array_equal(response.tokens, alone.tokens)
        np.testing.assert_allclose(response.entropies, alone.entropies, atol=1e-5)
    # It belongs to the response, not to the slot.
    engine.submit(0, [1, 2, 3], is_fresh=True, ids=(0, 0, 0, 0))
    (again,) = answer(engine, 0)
    np.testing.assert_array_equal(again.tokens, together[2].tokens)


@pytest.mark.parametrize("length", [1, 4, 7, 12, 16])
def test_a_conversation_that_is_cut_goes_on_as_a_fresh_one(length, engine):
    engine.submit(0, [1, 2, 3, 4], is_fresh=True, ids=(0, 0, 0, 0))
    (first,) = answer(engine, 0)
    whole = [*first.prompt_tokens, *first.tokens]
    engine.cut(0, length)
    rest = [] if length == 16 else [9, 8]
    before = engine.stats.prefilled_tokens
    engine.submit(0, rest, is_fresh=False, ids=(0, 0, 0, 1))
    engine.submit(1, [*whole[:length], *rest], is_fresh=True, ids=(0, 0, 0, 1))
    cut, fresh = answer(engine, 0, 1)
    np.testing.assert_array_equal(cut.prompt_tokens, fresh.prompt_tokens)
    np.testing.assert_array_equal(cut.tokens, fresh.tokens)
    np.testing.assert_allclose(cut.logprobs, fresh.logprobs, atol=1e-5)
    # The new ones but the newest, and the kept part's newest where nothing else is in the cache.
    new = len(rest) if length == 1 else max(0, len(rest) - 1)
    assert engine.stats.prefilled_tokens - before == new + length + len(rest) - 1


def test_a_response_in_progress_can_be_looked_at_and_dropped(engine):
    engine.submit(0, [1, 2, 3], is_fresh=True, ids=(0, 0, 0, 0))
    assert engine.step() == [] and len(engine.progress(0).tokens) == 6
    engine.cut(0, 3 + 6)
    assert not engine.has_work and engine.progress(0).versions.tolist() == [3] * 6
    with pytest.raises(ValueError, match="9 tokens cannot be cut to 10"):
        engine.cut(0, 10)
