"""One engine for training and evaluation: lent slots, and memory that is free during updates."""

import dataclasses

import jax
import numpy as np
import pytest

from empg_jax.engine.engine import Engine, EngineConfig
from empg_jax.models.decoder import DecoderConfig
from empg_jax.plan.explain import GIB, find_shape
from empg_jax.plan.memory import compute_plan
from tests import runs
from tests.engine.caches import cache_of
from tests.plan.test_memory import make_config
from tests.weights import make_weights

MODEL = DecoderConfig(
    vocab_size=40, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=32
)
SIZES = EngineConfig(
    slots=2,
    max_tokens=64,
    max_response_tokens=20,
    stop_ids=(-1,),
    burst=4,
    prefill_buckets=(8,),
    row_buckets=(2,),
    cache_buckets=(32, 64),
)


def make(**options):
    engine = Engine(MODEL, dataclasses.replace(SIZES, **options), seed=3)
    engine.load(make_weights(MODEL), 0)
    return engine


def ask(engine, slot, turn=0, **how):
    engine.submit(slot, [1 + slot, 2, 3], is_fresh=turn == 0, ids=(0, slot, 0, turn), **how)


def drain(engine):
    responses = []
    while engine.has_work:
        responses += engine.step()
    return {r.slot: (r.tokens.tolist(), r.logprobs.tolist(), r.versions.tolist()) for r in responses}


@pytest.mark.parametrize("ahead", [False, True])
def test_conversations_go_on_as_if_nothing_had_been(ahead):
    """In the middle of responses, with other weights, at another temperature."""
    engine, alone = make(ahead=ahead), make(ahead=ahead)
    for each in (engine, alone):
        ask(each, 0)
        ask(each, 1)
        each.step()
    cache = engine._memory.cache
    with engine.lent(engine.place(make_weights(MODEL, 1)), 7, temperature=0.0):
        assert engine.version == 7 and not engine.has_work
        ask(engine, 1)
        lent = drain(engine)
    assert engine._memory.cache is cache and engine.version == 0
    assert drain(engine) == drain(alone)
    engine.stats, stats = alone.stats, engine.stats
    assert stats == engine.stats  # the others' work is not counted as training's
    greedy = make()
    greedy.swap(greedy.place(make_weights(MODEL, 1)), 7)
    ask(greedy, 1, temperature=0.0)
    assert lent == drain(greedy)


def test_weights_that_are_there_stay():
    engine = make()
    with engine.lent({}, 0, temperature=1.0):
        ask(engine, 0)
        assert len(drain(engine)[0][0]) == 20


def test_without_kept_keys_the_cache_is_shared():
    engine = make()
    cache_of(engine)
    live = len(jax.live_arrays())
    with engine.lent({}, 0, temperature=1.0):
        ask(engine, 0)
        engine.step()
        assert len(jax.live_arrays()) <= live + 1
    ask(engine, 0)
    assert len(drain(engine)[0][0]) == 20


def test_a_freed_engine_holds_nothing_and_goes_on_with_new_weights():
    engine, alone = make(), make()
    for each in (engine, alone):
        ask(each, 0)
        drain(each)
    with pytest.raises(RuntimeError, match=r"Engine\.free in the middle of a turn"):
        ask(engine, 1)
        engine.free()
    engine.release(1)
    engine.free()
    assert engine._params is None and engine._memory.cache is None
    with pytest.raises(RuntimeError, match="there are no weights"):
        ask(engine, 0, turn=1)
    engine.load(make_weights(MODEL, 1), 1)
    alone.load(make_weights(MODEL, 1), 1)
    for each in (engine, alone):
        ask(each, 0, turn=1)
    (one,), (other,) = drain(engine).values(), drain(alone).values()
    assert one[0] == other[0]
    np.testing.assert_allclose(one[1], other[1], atol=1e-6)


@pytest.mark.slow
def test_a_run_that_frees_its_engine_is_the_same_run(tmp_path):
    options = ["rollout.deterministic=true", "eval.every=1", "sft.updates=0"]
    kept = runs.train(tmp_path / "kept", *runs.HOUSE, *options)
    freed = runs.train(tmp_path / "freed", *runs.HOUSE, *options, "rollout.release=true")
    assert runs.lines(kept) == runs.lines(freed) and runs.weights(kept) == runs.weights(freed)


def test_a_lag_needs_the_engine_during_updates(tmp_path):
    with pytest.raises(ValueError, match=r"rollout\.release=true needs train\.max_lag=0"):
        runs.configure(tmp_path, "rollout.release=true", "train.max_lag=1")


def test_full_tuning_of_32b_fits_one_node_when_the_engine_is_freed():
    model = {"preset": "qwen2.5-32b", "dtype": "bfloat16", "param_dtype": "bfloat16"}
    rollout = {"slots": 16, "tensor": 8, "release": True}
    config = make_config(dict(fsdp=8), 8, 4096, model=model)
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update=rollout)})
    freed = compute_plan(config, find_shape(config))
    kept = config.model_copy(update={"rollout": config.rollout.model_copy(update={"release": False})})
    assert freed.total < 80 * GIB < compute_plan(kept, find_shape(kept)).total
