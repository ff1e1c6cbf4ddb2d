"""A long prompt goes into the cache in chunks, beside the responses of others, and nothing else changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.config import load_config
from empg_jax.engine.engine import Engine, EngineConfig
from empg_jax.engine.programs import Chunk, compile_programs
from empg_jax.engine.sizes import MAX_PROGRAMS
from empg_jax.hf.presets import make_preset
from empg_jax.models.attention import cached
from empg_jax.models.decoder import init_cache, init_params
from empg_jax.parallel.mesh import make_mesh
from empg_jax.plan.explain import GIB, find_shape
from empg_jax.plan.memory import compute_plan
from empg_jax.run.assembly import make_language, make_model
from empg_jax.run.sampling import make_engine
from tests.engine.test_prefix import MODEL, PROMPTS, SIZES, check_same, task
from tests.weights import make_weights

CHUNK = 8
LONG = np.random.default_rng(7).integers(0, 38, 61).tolist()


def make(chunk=CHUNK, **sizes):
    sizes = {"prefill_buckets": (4, 8), "prefill_chunk": chunk, **sizes}
    engine = Engine(MODEL, dataclasses.replace(SIZES, **sizes), seed=3)
    engine.load(make_weights(MODEL), 0)
    return engine


def submit(engine, slot, prompt, turn=0, **how):
    engine.submit(slot, prompt, is_fresh=not turn, ids=(0, slot, 0, turn), **how)


def drain(engine):
    """The responses, and by step the tokens that it prefilled and sampled."""
    found, steps = {}, []
    while engine.has_work:
        before = dataclasses.replace(engine.stats)
        found |= {response.slot: response for response in engine.step()}
        stats = engine.stats
        steps.append(
            (
                stats.prefilled_tokens - before.prefilled_tokens,
                stats.sampled_tokens - before.sampled_tokens,
            )
        )
    return found, steps


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True])
def test_others_go_on_beside_a_long_prompt(ahead):
    found = {}
    for chunk in (CHUNK, 0):
        engine = make(chunk, stop_ids=(-1,), ahead=ahead, burst=1)
        submit(engine, 0, [1, 2, 3])
        engine.step()
        submit(engine, 1, LONG, max_response=2)
        responses, steps = drain(engine)
        found[chunk] = responses
        beside = [sampled for prefilled, sampled in steps if prefilled]
        if chunk:
            assert max(prefilled for prefilled, _ in steps) == CHUNK
            assert len(beside) == 8 and all(beside[:7])  # slot 0 has 8 tokens, one in each burst
        else:
            assert len(beside) == 1
    check_same(found[CHUNK], found[0])


def test_kept_conversations_and_shared_prompts_are_the_same_in_chunks():
    """Two attempts at one long prompt and one at its beginning; then each goes on with a long observation."""
    found, stats = {}, {}
    for chunk in (CHUNK, 0):
        engine = make(chunk, max_response_tokens=4)
        for slot, prompt in enumerate([LONG, LONG, LONG[:40], task(0)]):
            submit(engine, slot, prompt)
        found[chunk] = {(0, slot): response for slot, response in drain(engine)[0].items()}
        for slot in range(3):
            submit(engine, slot, LONG[20 + slot : 40 + slot], turn=1)
        found[chunk] |= {(1, slot): response for slot, response in drain(engine)[0].items()}
        stats[chunk] = engine.take_stats()
    check_same(found[CHUNK], found[0])
    assert len(found[0]) == 7
    # The second attempt waits for the first one and copies all of it, as in one piece.
    assert found[CHUNK][0, 1].copied == found[0][0, 1].copied == 60
    assert stats[CHUNK].prefilled_tokens == stats[0].prefilled_tokens
    assert stats[CHUNK].shared_tokens == stats[0].shared_tokens


def test_nothing_to_decode_gives_no_burst_and_loses_nothing():
    engine = make()
    submit(engine, 2, LONG)
    assert engine.step() == [] and engine.stats.bursts == 0 and engine.stats.prefilled_tokens == CHUNK
    # Given up in the middle: what is in the cache already serves the next prompt with that beginning.
    engine.cut(2, 30)
    submit(engine, 2, LONG[30:], turn=1)
    found, steps = drain(engine)
    whole = make(0)
    submit(whole, 2, LONG[:30], max_response=1)
    drain(whole)
    whole.cut(2, 30)
    submit(whole, 2, LONG[30:], turn=1)
    check_same(found, drain(whole)[0])
    assert sum(prefilled for prefilled, _ in steps) == 60 - CHUNK


def test_new_weights_in_the_middle_of_a_prompt_leave_rows_that_nobody_copies():
    engine = make(stop_ids=(-1,))
    submit(engine, 0, LONG)
    engine.step()
    engine.swap(engine.place(make_weights(MODEL, 1)), 1, keep_cache=True)
    assert engine.measure_stale_gap() is None  # it has no next token yet
    submit(engine, 1, LONG)
    found, _ = drain(engine)
    assert engine.stats.prefilled_tokens == 2 * 60 and engine.stats.shared_tokens == 0
    fresh = make(0, stop_ids=(-1,))
    fresh.load(make_weights(MODEL, 1), 1)
    submit(fresh, 1, LONG)
    assert set(found.pop(0).versions) == {1}
    check_same(found, drain(fresh)[0])


def test_any_mixture_of_turns_gives_the_same_responses():
    """Each slot asks its next turn as soon as it is free, so that prompts meet responses in every order."""
    generator = np.random.default_rng(11)
    prompts = [*PROMPTS[:4], LONG, LONG[:50]]
    turns = [
        [(prompts[generator.integers(len(prompts))], generator.integers(2)) for _ in range(5)]
        for _ in range(4)
    ]
    found = {}
    for chunk in (CHUNK, 0):
        engine, done, busy = make(chunk), [0] * 4, [False] * 4
        found[chunk] = {}
        while not all(count == len(plan) for count, plan in zip(done, turns, strict=True)):
            for slot, plan in enumerate(turns):
                if not busy[slot] and done[slot] < len(plan):
                    tokens, follows = plan[done[slot]]
                    new = tokens[:20] if follows else tokens
                    is_fresh = not follows or engine.room(slot, len(new), is_fresh=False) < 1
                    engine.submit(slot, new, is_fresh=is_fresh, ids=(0, slot, 0, done[slot]))
                    busy[slot] = True
            for response in engine.step():
                found[chunk][response.slot, done[response.slot]] = response
                done[response.slot] += 1
                busy[response.slot] = False
    assert len(found[0]) == 20
    check_same(found[CHUNK], found[0])


def test_blocks_of_queries_give_the_same_numbers(monkeypatch):
    """The scores of all queries at once need too much memory where prompts are long."""
    keys = iter(jax.random.split(jax.random.key(0), 3))
    queries = jax.random.normal(next(keys), (3, 12, 4, 8))
    cache = [jax.random.normal(next(keys), (3, 2, 32, 8)) for _ in range(2)]
    positions = jnp.asarray([[5], [0], [32]]) + jnp.arange(12)[None]
    whole = cached.cached_attention(queries, *cache, positions)
    monkeypatch.setattr(cached, "SCORES", 5 * 3 * 4 * 32)  # five queries of each row fit: four at a time
    jaxpr = jax.make_jaxpr(lambda *args: cached.attend(*args))(queries, *cache, positions)
    assert "length=3" in str(jaxpr)
    np.testing.assert_allclose(cached.cached_attention(queries, *cache, positions), whole, atol=1e-6)


# ------------------------------------------------------------------------------------ sizes and memory


def test_the_configuration_sets_the_chunk_and_the_largest_bucket():
    def sizes(*changes):
        config = load_config("quickstart", ["rollout.max_tokens=8192", "train.micro_tokens=8192", *changes])
        tokenizer = make_language(config).tokenizer
        return make_engine(config, make_model(config, tokenizer), tokenizer.stop_ids).config

    assert sizes().prefill_chunk == 1024 and sizes().prefill_buckets == (16, 24, 32)
    own = sizes("rollout.prefill_chunk=512", "rollout.prefill_buckets=null", "rollout.slots=4")
    assert own.prefill_chunk == 512 and own.prefill_buckets[-1] == 512
    assert sizes("rollout.prefill_chunk=0").prefill_chunk == 0
    assert sizes("rollout.prefill_chunk=20").prefill_chunk == 32


@pytest.mark.parametrize("slots", [1, 16, 128])
@pytest.mark.parametrize("chunk", [0, 256, 1000, 8192])
@pytest.mark.parametrize("max_tokens", [256, 32768])
def test_any_chunk_takes_few_programs(slots, chunk, max_tokens):
    config = EngineConfig(slots, max_tokens, 128, stop_ids=(1,), prefill_chunk=chunk)
    assert config.num_programs <= MAX_PROGRAMS
    assert config.prefill_buckets[-1] <= max(16, chunk or 1024, 0)
    assert not chunk or config.prefill_chunk == chunk


def seven_billion(chunk=1024):
    rollout = {"max_tokens": 32768, "tasks_per_update": 2, "group_size": 8, "prefill_chunk": chunk}
    sections = {"model": {"preset": "qwen2.5-7b", "dtype": "bfloat16"}, "rollout": rollout}
    config = load_config("quickstart", [])
    return type(config).model_validate({**sections, "train": {"micro_tokens": 32768}})


def test_the_plan_of_a_long_prefill_is_small():
    config = seven_billion()
    items = {item.name: item.size for item in compute_plan(config, find_shape(config)).items}
    assert items["sampling"] <= 2 * GIB


@pytest.mark.slow
@pytest.mark.parametrize("rows, length", [(1, 1024), (16, 256)])
def test_the_compiler_reserves_little_for_a_long_prefill(rows, length):
    """At float32 and two layers: layers are computed one after another, in the same memory."""
    model = make_preset("qwen2.5-7b", dtype=jnp.float32)
    model = dataclasses.replace(model, num_layers=2)
    config = EngineConfig(16, 32768, 128, stop_ids=(1,))
    assert rows in config.prefill_rows(length)
    programs = compile_programs(model, config, make_mesh(devices=jax.local_devices()[:1]))
    shape = jax.ShapeDtypeStruct
    params = jax.eval_shape(programs.unstack, jax.eval_shape(lambda: init_params(jax.random.key(0), model)))
    cache = jax.eval_shape(lambda: init_cache(programs.layout, config.slots, config.max_tokens))
    chunk = Chunk(*(shape(size, jnp.int32) for size in ((rows,), (rows, length), (rows, 2))))
    memory = programs.prefill.lower(params, cache, chunk).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 2 * GIB
