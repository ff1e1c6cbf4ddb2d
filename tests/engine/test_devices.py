"""An engine over several devices answers as one does, and its devices tell each other little."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from empg_jax.engine.engine import Engine
from empg_jax.engine.programs import Chunk, Request
from empg_jax.models.decoder import init_params
from empg_jax.models.moe import MoeConfig
from empg_jax.parallel.mesh import make_mesh
from tests.engine.caches import cache_of
from tests.engine.test_engine import SHALLOW, SIZES, draw_tokens, finish, make, same

assert make  # a fixture


@pytest.mark.slow
def test_a_new_cache_is_made_in_its_place(make):
    engine = make(mesh=make_mesh(data=2, tensor=2))
    made = engine._programs.new_cache.lower(64).compile()
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(engine._programs.new_cache(64)))
    analysis = made.memory_analysis()
    assert analysis.output_size_in_bytes + analysis.temp_size_in_bytes <= whole / 4 + 1024


@pytest.mark.slow
def test_a_mesh_changes_nothing_but_the_place(make):
    prompts = [draw_tokens(np.random.default_rng(slot), 5 + slot) for slot in range(4)]
    whole, split = make(SHALLOW), make(SHALLOW, mesh=make_mesh(data=2, tensor=2))
    answers = []
    for engine in (whole, split):
        for slot, prompt in enumerate(prompts):
            engine.submit(slot, prompt, is_fresh=True, ids=(0, slot, 0, 0))
        answers.append(finish(engine))
    for slot in range(4):
        assert same(answers[0][slot], answers[1][slot])
    for leaf in (*jax.tree.leaves(cache_of(split)), split._params["layers"][0]["up_proj"]["kernel_t"]):
        assert max(shard.data.nbytes for shard in leaf.addressable_shards) < leaf.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("heads, kv_heads, parts, share", [(4, 2, 4, 0.5), (6, 3, 2, 1.0), (6, 2, 4, 1.0)])
def test_heads_that_do_not_divide_are_repeated_and_answer_the_same(heads, kv_heads, parts, share):
    """A device holds one of two heads; three of six, as many as before; or all, where nothing divides."""
    model = dataclasses.replace(SHALLOW, num_heads=heads, num_kv_heads=kv_heads)
    params = init_params(jax.random.key(0), model)
    answers, caches = [], []
    for mesh in (make_mesh(), make_mesh(tensor=parts)):
        engine = Engine(model, SIZES, seed=0, mesh=mesh)
        engine.load(params, 0)
        for slot in range(4):
            engine.submit(slot, [1 + slot, 2, 3], is_fresh=True, ids=(0, slot, 0, 0))
        answers.append(finish(engine))
        caches.append(cache_of(engine)[0][0])
    for slot in range(4):
        assert same(answers[0][slot], answers[1][slot])
    each = max(shard.data.nbytes for shard in caches[1].addressable_shards)
    assert each == caches[0].nbytes * share


def told_per_step(engine):
    """Shapes that the devices tell each other within a step of decoding, without sums over them."""
    plan, limits = np.zeros((4, 8), np.int32), np.zeros(2, np.int32)
    request = Request(engine._key, plan, engine._carried, limits, np.ones(4, np.float32))
    written = engine._programs.decode.lower(engine._params, cache_of(engine), request).compile().as_text()
    found = re.findall(
        r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all)\(.*op_name=\"[^\"]*while/body", written
    )
    return [tuple(map(int, shape.split(","))) for shape in found]


def test_slots_of_different_devices_tell_each_other_nothing(make):
    assert told_per_step(make(mesh=make_mesh(data=4))) == []


@pytest.mark.parametrize("rows", [4, 8])
def test_each_device_computes_the_prompts_of_its_own_slots(make, rows):
    """A quarter of the work, and nothing to tell."""
    chunk = Chunk(np.zeros(rows, np.int32), np.zeros((rows, 16), np.int32), np.zeros((rows, 2), np.int32))
    whole, split = (
        engine._programs.prefill.lower(engine._params, cache_of(engine), chunk).compile()
        for engine in (make(slots=8), make(slots=8, mesh=make_mesh(data=4)))
    )
    assert split.cost_analysis()["flops"] < 0.3 * whole.cost_analysis()["flops"]
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", split.as_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", [pytest.param({"data": 4}, marks=pytest.mark.long), {"data": 2, "tensor": 2}]
)
def test_prompts_of_any_slots_are_answered_the_same_over_devices(make, axes):
    engines = [make(SHALLOW, slots=8, mesh=mesh) for mesh in (make_mesh(), make_mesh(**axes))]
    assert engines[1].config.row_buckets == ((4, 8) if axes["data"] == 4 else (2, 4, 8))
    generator, turns = np.random.default_rng(3), np.zeros(8, int)
    for _ in range(12):
        slots = generator.choice(8, generator.integers(1, 8), replace=False)
        is_fresh = bool(generator.integers(2))
        prompts = {int(slot): draw_tokens(generator, int(generator.integers(1, 12))) for slot in slots}
        answers = []
        for engine in engines:
            for slot, prompt in prompts.items():
                fresh = is_fresh or not turns[slot] or engine.room(slot, len(prompt), is_fresh=False) < 12
                engine.submit(slot, prompt, is_fresh=fresh, ids=(0, slot, 0, int(turns[slot])))
            answers.append(finish(engine))
        turns[slots] += 1
        assert all(same(answers[0][slot], answers[1][slot]) for slot in prompts)
    assert engines[1].stats.prefilled_tokens > 300


@pytest.mark.parametrize("vocab, told", [(1184, [(4, 12)]), (1183, [])])
def test_a_draw_gathers_one_number_per_block_of_the_vocabulary(make, vocab, told):
    """Of 1,184 tokens each of four devices has 296, in three blocks; 1,183 stay whole on each."""
    model = dataclasses.replace(SHALLOW, vocab_size=vocab)
    assert told_per_step(make(model, mesh=make_mesh(tensor=4))) == told


def test_draws_from_a_split_vocabulary_are_those_from_a_whole_one(make):
    model = dataclasses.replace(SHALLOW, vocab_size=1184)
    answers = []
    for engine in (make(model), make(model, mesh=make_mesh(data=2, tensor=2))):
        for slot in range(4):
            engine.submit(slot, [7 * slot + 1, 900, 1100], is_fresh=True, ids=(0, slot, 0, 0))
        answers.append(finish(engine))
    assert all(same(answers[0][slot], answers[1][slot]) for slot in range(4))
    assert max(token for answer in answers[0].values() for token in answer.tokens) > 888  # the last quarter


@pytest.mark.slow
def test_experts_stay_on_their_devices_and_answer_the_same(make):
    moe = MoeConfig(num_experts=4, top_k=2, expert_size=16)
    model = dataclasses.replace(SHALLOW, moe=moe, intermediate_size=0)
    engines = [make(model, mesh=mesh) for mesh in (make_mesh(), make_mesh(data=2, tensor=2))]
    answers = []
    for engine in engines:
        for slot in range(4):
            engine.submit(slot, [slot + 1, 2, 3], is_fresh=True, ids=(0, slot, 0, 0))
        answers.append(finish(engine))
    assert all(same(answers[0][slot], answers[1][slot]) for slot in range(4))
    assert all(len(shape) < 3 for shape in told_per_step(engines[1]))  # no matrices of experts
