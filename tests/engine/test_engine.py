"""The engine: kept KV equals the full forward, samples depend on their ids alone, shapes stay compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.config import load_config
from empg_jax.engine.engine import Engine, EngineConfig
from empg_jax.engine.prefill import fit
from empg_jax.engine.programs import Chunk, Request
from empg_jax.learner.outputs import compute_logprobs
from empg_jax.models.decoder import DecoderConfig
from empg_jax.run.process import CompileCounter
from tests.engine.caches import cache_of
from tests.runs import ROOT
from tests.weights import make_weights

MODEL = DecoderConfig(vocab_size=60, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8)
# For what does not depend on depth: it compiles faster.
SHALLOW = dataclasses.replace(MODEL, num_layers=1)
NO_STOPS, STOPS = (-1,), (58, 59)
# Most tests share these sizes, and with them the compiled programs.
SIZES = EngineConfig(
    slots=4,
    max_tokens=128,
    max_response_tokens=12,
    stop_ids=NO_STOPS,
    burst=6,
    patience=2,
    prefill_buckets=(4, 16),
    row_buckets=(1, 2),
    cache_buckets=(32, 64),
)
score = jax.jit(compute_logprobs, static_argnums=(1, 5))


@pytest.fixture
def make():
    """Engines with weights. Those of equal shape share their programs."""

    def make(model=MODEL, seed=0, temperature=1.0, mesh=None, **sizes):
        config = dataclasses.replace(SIZES, **sizes)
        engine = Engine(model, config, seed=seed, temperature=temperature, mesh=mesh)
        engine.load(make_weights(model), 0)
        return engine

    return make


def draw_tokens(generator, count):
    return generator.integers(0, 50, count).tolist()


def finish(engine, **how):
    """Steps until nothing is left; responses by slot."""
    responses = {}
    while engine.has_work:
        for response in engine.step(**how):
            assert response.slot not in responses
            responses[response.slot] = response
    return responses


def ask(engine, slot, tokens, *, ids=None, is_fresh=True, **how):
    """One response, with the other slots as they are."""
    engine.submit(slot, tokens, is_fresh=is_fresh, ids=ids or (0, slot, 0, 0), **how)
    return finish(engine)[slot]


def full_forward(tokens, temperature=1.0, params=None):
    """The learner's log-probs and entropies of one conversation, padded to a fixed length."""
    row = np.zeros((1, SIZES.max_tokens), np.int32)
    row[0, : len(tokens)] = tokens
    positions = np.arange(SIZES.max_tokens, dtype=np.int32)[None]
    params = make_weights(MODEL) if params is None else params
    found = score(params, MODEL, row, positions, np.ones_like(row), temperature)
    return [np.asarray(values)[0, : len(tokens)] for values in found]


def check_statistics(response, temperature=1.0, params=None):
    start = len(response.prompt_tokens)
    whole = np.concatenate([response.prompt_tokens, response.tokens])
    logprobs, entropies = full_forward(whole, temperature, params)
    np.testing.assert_allclose(response.logprobs, logprobs[start:], atol=1e-5)
    np.testing.assert_allclose(response.entropies, entropies[start:], atol=1e-5)


# ---------------------------------------------------------------------------------------------- KV


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.slow), 0.6])
def test_ten_turns_of_kept_kv_equal_the_full_forward_and_prefill_only_what_is_new(make, temperature):
    engine = make(temperature=temperature)
    generator = np.random.default_rng(0)
    held = {slot: [] for slot in range(4)}
    for turn in range(10):
        new = {slot: draw_tokens(generator, generator.integers(1, 7)) for slot in held}
        for slot, tokens in new.items():
            engine.submit(slot, tokens, is_fresh=not turn, ids=(0, slot, 0, turn), max_response=5)
        responses = finish(engine)
        # The newest token goes through decode, as does the last sampled one of the turn before.
        expected = sum(len(tokens) - (not turn) for tokens in new.values())
        assert engine.take_stats().prefilled_tokens == expected
        for slot, response in responses.items():
            assert response.prompt_tokens.tolist() == held[slot] + new[slot]
            held[slot] += new[slot] + response.tokens.tolist()
            check_statistics(response, temperature)
    assert min(len(tokens) for tokens in held.values()) > 20


def test_a_long_prompt_goes_in_chunks(make):
    engine = make()
    response = ask(engine, 1, draw_tokens(np.random.default_rng(1), 43))
    assert engine.stats.prefilled_tokens == 42
    check_statistics(response)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_any_number_of_prompts_of_any_length_go_together(make, count):
    engine = make()
    generator = np.random.default_rng(count)
    for slot in range(count):
        engine.submit(slot, draw_tokens(generator, 1 + 11 * slot), is_fresh=True, ids=(0, slot, 0, 0))
    responses = finish(engine)
    assert len(responses) == count
    for response in responses.values():
        check_statistics(response)


def test_the_cache_grows_in_buckets_and_starts_short_again(make):
    engine = make()
    generator = np.random.default_rng(2)
    capacities, turn = [], 0
    while engine.room(0, 9, is_fresh=False) > 0:
        check_statistics(ask(engine, 0, draw_tokens(generator, 9), ids=(0, 0, 0, turn), is_fresh=not turn))
        capacities.append(engine.capacity)
        turn += 1
    assert sorted(set(capacities)) == [32, 64, 128] and capacities == sorted(capacities)
    engine.release(0)
    check_statistics(ask(engine, 0, [1, 2, 3]))
    assert engine.capacity == 32


def test_a_conversation_survives_the_growth_for_another_one(make):
    engine = make()
    first = ask(engine, 0, [5, 6, 7])
    ask(engine, 1, draw_tokens(np.random.default_rng(3), 80))
    assert engine.capacity == 128
    engine.take_stats()
    second = ask(engine, 0, [8, 9], is_fresh=False, ids=(0, 0, 0, 1))
    assert engine.stats.prefilled_tokens == 2
    assert second.prompt_tokens.tolist() == [5, 6, 7, *first.tokens.tolist(), 8, 9]
    check_statistics(second)


# ----------------------------------------------------------------------------------------- sampling


def same(a, b):
    return np.array_equal(a.tokens, b.tokens) and np.allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_a_sample_does_not_depend_on_what_else_is_in_the_batch(make):
    prompt, ids = [3, 1, 4, 1, 5], (0, 9, 2, 6)
    alone = ask(make(), 0, prompt, ids=ids)
    engine, generator = make(), np.random.default_rng(4)
    for slot in (0, 1, 3):
        engine.submit(slot, draw_tokens(generator, 20 + slot), is_fresh=True, ids=(0, slot, 1, 1))
    engine.step()
    engine.submit(2, prompt, is_fresh=True, ids=ids)
    among = finish(engine)[2]
    assert len(alone.tokens) > 2 and same(alone, among)


def test_equal_ids_give_equal_tokens_and_any_other_number_gives_others(make):
    prompt = [3, 1, 4, 1, 5]

    def tokens(seed=0, ids=(0, 1, 2, 3)):
        return tuple(ask(make(seed=seed), 0, prompt, ids=ids).tokens.tolist())

    reference = tokens()
    assert tokens() == reference
    others = [tokens(seed=1), tokens(ids=(1, 1, 2, 3)), tokens(ids=(0, 2, 2, 3)), tokens(ids=(0, 1, 3, 3))]
    others.append(tokens(ids=(0, 1, 2, 4)))
    assert len({reference, *others}) == 6


@pytest.mark.parametrize("sizes", [{"burst": 1}, {"slots": 7, "cache_buckets": (128,)}])
def test_sizes_do_not_change_the_samples(make, sizes):
    prompt = draw_tokens(np.random.default_rng(5), 21)
    assert same(ask(make(SHALLOW), 0, prompt), ask(make(SHALLOW, **sizes), 0, prompt))


def test_greedy_takes_the_most_likely_token(make):
    response = ask(make(temperature=0.0), 0, [7, 7, 7])
    for length in range(len(response.tokens)):
        prefix = [7, 7, 7, *response.tokens[:length].tolist()]
        candidates = [full_forward([*prefix, token])[0][-1] for token in range(MODEL.vocab_size)]
        assert int(np.argmax(candidates)) == response.tokens[length]
    check_statistics(response)


# ------------------------------------------------------------------------------------------- ending


def test_stop_tokens_end_a_response_and_belong_to_it(make):
    engine = make(SHALLOW, stop_ids=STOPS)
    reasons = set()
    for group in range(40):
        response = ask(engine, 0, [1, 2], ids=(0, group, 0, 0))
        reasons.add(response.finish_reason)
        stopped = [token in STOPS for token in response.tokens.tolist()]
        assert not any(stopped[:-1])
        if response.finish_reason == "stop":
            assert stopped[-1]
        else:
            assert not stopped[-1] and len(response.tokens) == SIZES.max_response_tokens
    assert reasons == {"stop", "length"}


def test_max_response_bounds_one_response(make):
    engine = make()
    response = ask(engine, 0, [1, 2], max_response=3)
    assert (len(response.tokens), response.finish_reason) == (3, "length")
    assert len(ask(engine, 0, [1], is_fresh=False, max_response=99).tokens) == SIZES.max_response_tokens


def test_a_response_ends_where_the_conversation_is_full(make):
    engine = make()
    prompt = draw_tokens(np.random.default_rng(6), SIZES.max_tokens - 5)
    assert engine.room(0, len(prompt), is_fresh=True) == 5
    response = ask(engine, 0, prompt)
    assert (len(response.tokens), response.finish_reason) == (5, "length")
    check_statistics(response)
    assert engine.room(0, 0, is_fresh=False) == 0
    with pytest.raises(ValueError, match="1 new tokens leave no room"):
        engine.submit(0, [1], is_fresh=False, ids=(0, 0, 0, 1))


def test_an_eager_step_returns_when_enough_responses_have_ended(make):
    engine = make()
    for slot, length in enumerate([2, 4, 7, 9]):
        engine.submit(slot, [1, 2], is_fresh=True, ids=(0, slot, 0, 0), max_response=length)
    assert [r.slot for r in engine.step()] == [0, 1]
    assert engine.stats.decode_rows == 4 * 4 and engine.stats.sampled_tokens == 2 + 3 * 4
    # Free slots are taken at once, while the others are in the middle of their responses.
    engine.submit(0, [3], is_fresh=True, ids=(0, 9, 0, 0), max_response=6)
    ended = engine.step(is_eager=False)
    assert [(r.slot, len(r.tokens)) for r in ended] == [(0, 6), (2, 7), (3, 9)]
    for response in ended:
        check_statistics(response)
    assert not engine.has_work and engine.step() == []


def test_idle_slots_keep_their_conversation_while_others_decode(make):
    engine = make()
    first = ask(engine, 0, [5, 6, 7])
    for group in range(3):
        ask(engine, 1, [9, 9], ids=(0, group, 0, 0))
    second = ask(engine, 0, [8], is_fresh=False, ids=(0, 0, 0, 1))
    assert second.prompt_tokens.tolist() == [5, 6, 7, *first.tokens.tolist(), 8]
    check_statistics(second)


def test_a_released_slot_drops_its_response_and_is_free(make):
    engine = make()
    engine.submit(0, [1, 2, 3], is_fresh=True, ids=(0, 0, 0, 0))
    engine.submit(1, [4], is_fresh=True, ids=(0, 1, 0, 0))
    assert engine.step() == []
    engine.release(0)
    engine.submit(0, [9, 9], is_fresh=True, ids=(0, 2, 0, 0))
    responses = finish(engine)
    assert responses[0].prompt_tokens.tolist() == [9, 9] and set(responses) == {0, 1}
    for response in responses.values():
        check_statistics(response)


# ------------------------------------------------------------------------------------------ weights


def test_new_weights_drop_the_kv_and_are_used_from_then_on(make):
    engine = make()
    first = ask(engine, 0, [5, 6, 7])
    assert set(first.versions) == {0}
    engine.take_stats()
    engine.load(make_weights(MODEL, 1), 4)
    second = ask(engine, 0, [8, 9], is_fresh=False, ids=(0, 0, 0, 1))
    assert set(second.versions) == {4}
    assert engine.stats.prefilled_tokens == 3 + len(first.tokens) + 2 - 1
    check_statistics(second, params=make_weights(MODEL, 1))
    with pytest.raises(AssertionError):
        check_statistics(second)


def test_loaded_weights_are_a_copy(make):
    """The learner donates its parameters to the next update."""
    engine = make()
    mine = jax.tree.map(jnp.copy, make_weights(MODEL))
    engine.load(mine, 1)
    jax.tree.map(lambda leaf: leaf.delete(), mine)
    check_statistics(ask(engine, 0, [5, 6, 7]))


def publish(engine, params, version):
    """New weights in the middle of responses, over the keys and values of the older ones."""
    engine.swap(engine.place(params), version, keep_cache=True)


def test_weights_may_change_in_the_middle_of_a_response_on_request(make):
    engine = make()
    for slot in range(3):
        engine.submit(slot, [5, 6, slot], is_fresh=True, ids=(0, slot, 0, 0))
    engine.step(is_eager=False)
    before = engine.stats.prefilled_tokens
    publish(engine, make_weights(MODEL, 1), 4)
    responses = finish(engine, is_eager=False)
    assert engine.stats.prefilled_tokens == before  # nothing is computed anew
    for response in responses.values():
        assert response.versions.tolist() == [0] * 6 + [4] * 6
        # The older part is exactly what the older weights say, whatever came after.
        with pytest.raises(AssertionError):
            check_statistics(response)


def test_the_gap_of_kept_keys_is_measured_and_closed_by_prefilling_anew(make):
    engine = make()
    assert engine.measure_stale_gap() is None  # nothing is in progress
    for slot in range(3):
        engine.submit(slot, [5, 6, slot], is_fresh=True, ids=(0, slot, 0, 0))
    assert engine.measure_stale_gap() is None  # nothing is cached
    engine.step(is_eager=False)
    assert engine.measure_stale_gap() < 1e-5  # the same weights
    publish(engine, make_weights(MODEL, 1), 4)
    assert engine.measure_stale_gap() > 1e-3
    assert engine.measure_stale_gap() < 1e-5  # the longest four were just computed anew
    publish(engine, make_weights(MODEL), 5)
    engine.drop_cache()
    responses = finish(engine, is_eager=False)
    for slot, response in responses.items():
        assert response.versions.tolist() == [0] * 6 + [5] * 6
        # The same weights as at the start: as if nothing had happened.
        again = ask(make(), slot, [5, 6, slot])
        assert again.tokens.tolist() == response.tokens.tolist()
        check_statistics(response)


def test_weights_do_not_change_in_the_middle_of_a_response(make):
    engine = make()
    engine.submit(0, [1], is_fresh=True, ids=(0, 0, 0, 0))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="in the middle of a turn"):
            engine.load(make_weights(MODEL, 1), 1)
        engine.step()
    finish(engine)
    engine.load(make_weights(MODEL, 1), 1)
    assert engine.version == 1


# ------------------------------------------------------------------------------------------- errors


def test_misuse_is_refused():
    engine = Engine(MODEL, SIZES, seed=0)
    with pytest.raises(RuntimeError, match=r"before Engine\.load"):
        engine.submit(0, [1], is_fresh=True, ids=(0, 0, 0, 0))
    with pytest.raises(RuntimeError, match=r"warm_up needs loaded weights"):
        engine.warm_up()
    engine.load(make_weights(MODEL), 0)
    with pytest.raises(ValueError, match="empty prompt"):
        engine.submit(0, [], is_fresh=True, ids=(0, 0, 0, 0))
    with pytest.raises(ValueError, match="max_response=0 must be at least 1"):
        engine.submit(0, [1], is_fresh=True, ids=(0, 0, 0, 0), max_response=0)
    with pytest.raises(ValueError, match=r"128 new tokens leave no room .* max_tokens=128"):
        engine.submit(0, [1] * 128, is_fresh=True, ids=(0, 0, 0, 0))
    assert not engine.has_work
    engine.submit(0, [1], is_fresh=True, ids=(0, 0, 0, 0))
    with pytest.raises(RuntimeError, match="slot 0 is still answering"):
        engine.submit(0, [1], is_fresh=False, ids=(0, 0, 0, 0))
    with pytest.raises(RuntimeError, match="no live conversation"):
        engine.warm_up()
    with pytest.raises(ValueError, match="temperature=-1"):
        Engine(MODEL, SIZES, seed=0, temperature=-1)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"stop_ids": ()}, "stop_ids is empty"),
        ({"max_response_tokens": 128}, r"max_response_tokens=128 must lie in \[1, max_tokens=128\)"),
        ({"max_response_tokens": 0}, "max_response_tokens=0"),
    ],
)
def test_impossible_sizes_are_refused(sizes, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(SIZES, **sizes)


# ------------------------------------------------------------------------------------------- shapes


def test_default_buckets_cover_the_sizes():
    sizes = EngineConfig(slots=128, max_tokens=250, max_response_tokens=8, stop_ids=(1,))
    assert sizes.prefill_buckets == (16, 64)
    assert sizes.row_buckets == (1, 16, 128)
    assert sizes.cache_buckets == (128, 250)
    assert sizes.prefill_lengths(32) == (16,)
    long = EngineConfig(2, 1000, 8, (1,), prefill_buckets=(256,))
    assert long.prefill_rows(256) == (1, 2)
    assert long.cache_buckets[-1] == 1024  # whole tiles, for the kernels of accelerators


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_needs_few_programs(path):
    r = load_config(path).rollout
    slots = r.slots or r.tasks_per_update * r.group_size
    lengths = tuple(r.prefill_buckets or ())
    sizes = EngineConfig(slots, r.max_tokens, r.max_response_tokens, (1,), prefill_buckets=lengths)
    assert sizes.num_programs <= 24
    assert sizes.cache_buckets[-1] == r.max_tokens and sizes.row_buckets[-1] == slots
    assert lengths in ((), sizes.prefill_buckets)  # what a configuration names is kept


@pytest.mark.slow
def test_the_warm_up_compiles_as_many_programs_as_are_said():
    sizes = EngineConfig(4, 40, 6, NO_STOPS, prefill_buckets=(4, 16), cache_buckets=(8, 24))
    engine = Engine(SHALLOW, sizes, seed=0)
    engine.load(make_weights(SHALLOW), 0)
    names, checks = ("prefill", "decode", "grow", "copy_rows"), []
    programs = [getattr(engine._programs, name) for name in names]
    before = sum(program._cache_size() for program in programs)
    with CompileCounter() as compiled:
        engine.warm_up(lambda: checks.append(None))
    assert sum(program._cache_size() for program in programs) - before == sizes.num_programs == len(checks)
    # What compiles side by side serves the calls; besides, there may be an empty cache of each length.
    assert 0 <= compiled.count - sizes.num_programs <= len(sizes.cache_buckets)


@pytest.mark.parametrize(
    ("size", "expected"), [(1, 4), (4, 4), (5, 4), (8, 4), (9, 16), (16, 16), (33, 32), (99, 32)]
)
def test_the_bucket_is_at_least_half_full_or_smaller(size, expected):
    assert fit(size, (4, 16, 32)) == expected


def test_nothing_compiles_after_the_warm_up(make):
    engine = make(SHALLOW, slots=2, prefill_buckets=(8,), row_buckets=(1,), cache_buckets=(64,))
    engine.warm_up()
    generator, longest = np.random.default_rng(7), 0
    with CompileCounter() as compiles:
        for round_number in range(30):
            for slot in range(2):
                count = int(generator.integers(1, 20))
                is_fresh = engine.room(slot, count, is_fresh=False) < 1 or generator.random() < 0.2
                if generator.random() < 0.8:
                    ids = (0, slot, 0, round_number)
                    engine.submit(slot, draw_tokens(generator, count), is_fresh=is_fresh, ids=ids)
            finish(engine, is_eager=bool(round_number % 2))
            longest = max(longest, engine.capacity)
            if round_number % 10 == 9:
                engine.load(make_weights(SHALLOW), round_number)
            if round_number == 15:
                for slot in range(2):
                    engine.release(slot)
    assert engine.stats.responses > 40 and longest == 128
    assert compiles.count == 0


def test_norms_keep_the_type_in_which_the_learner_multiplies_by_them(make):
    engine = make(dataclasses.replace(MODEL, dtype=jnp.bfloat16))
    layer = engine._params["layers"][0]
    scales = layer["input_norm"], layer["post_norm"], engine._params["final_norm"]
    assert {scale["scale"].dtype for scale in scales} == {jnp.dtype(jnp.float32)}
    assert layer["gate_up_proj"]["kernel_t"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "slots"), [("decode", 4), ("prefill", 4), ("copy_rows", 4), ("decode", 1), ("prefill", 1)]
)
def test_no_program_copies_the_cache(make, name, slots):
    engine = make(slots=slots)
    given = (engine._params, cache_of(engine))
    if name == "decode":
        plan, limits = np.zeros((slots, 8), np.int32), np.zeros(2, np.int32)
        inputs = Request(engine._key, plan, engine._carried, limits, np.ones(slots, np.float32))
    elif name == "copy_rows":
        given, inputs = (cache_of(engine),), np.zeros((4, 3), np.int32)
    else:
        inputs = Chunk(np.zeros(1, np.int32), np.zeros((1, 16), np.int32), np.zeros((1, 2), np.int32))
    program = getattr(engine._programs, name)
    compiled = program.lower(*given, inputs).compile()
    shape = ",".join(map(str, cache_of(engine)[0][0].shape))
    copies = [line for line in compiled.as_text().splitlines() if " copy(" in line and f"[{shape}]" in line]
    assert copies == []
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache_of(engine)))
    assert compiled.memory_analysis().alias_size_in_bytes >= size


@pytest.mark.parametrize("page_tokens", [0, 16])
def test_weights_that_are_no_numbers_leave_nothing_behind(make, page_tokens):
    engine = make(page_tokens=page_tokens)
    good = make_weights(MODEL)
    bad = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), good)

    def play(length):
        for slot in range(2):
            prompt = list(range(2, 2 + length))
            engine.submit(slot, prompt, is_fresh=True, ids=(0, 0, slot, 0), max_response=6)
        responses = finish(engine)
        for slot in responses:
            engine.release(slot)
        return [responses[slot].logprobs for slot in range(2)]

    expected = play(12)
    engine.load(bad, 1)
    assert np.isnan(play(40)).all()
    engine.load(good, 2)
    np.testing.assert_array_equal(play(12), expected)
    with engine.lent(engine.place(bad), 3, temperature=1.0):
        assert np.isnan(play(40)).all()
    np.testing.assert_array_equal(play(12), expected)


def test_ids_beyond_the_vocabulary_are_refused(make):
    """Their embeddings would be NaN, and with pages so would the next conversation's."""
    engine = make()
    for wrong in (-1, MODEL.vocab_size):
        with pytest.raises(ValueError, match=rf"slot 1: {wrong} is no token id; .* \[0, 60\)"):
            engine.submit(1, [3, wrong], is_fresh=True, ids=(0, 0, 0, 0))
    assert not engine.has_work
