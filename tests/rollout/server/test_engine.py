"""The engine on a server: slots, weights, and episodes whose responses failed."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from empg_jax.engine.sizes import EngineConfig
from empg_jax.hf.load import load_hf
from empg_jax.models.decoder import DecoderConfig, init_params
from empg_jax.models.filtering import NO_FILTER
from empg_jax.models.lora import LoraConfig, make_lora, merge
from empg_jax.rollout.server.answers import SamplerError
from empg_jax.rollout.server.engine import ServerEngine, make_seed
from empg_jax.rollout.server.folders import PREFIX, Folders
from empg_jax.types import Status
from empg_jax.workers.pool import EnvPool
from tests.rollout import scripted
from tests.rollout.server.standin import STOP, VOCABULARY, StandIn, connected

MODEL = DecoderConfig(
    vocab_size=VOCABULARY,
    hidden_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=8,
    tie_embeddings=False,
)
SIZES = EngineConfig(slots=2, max_tokens=16, max_response_tokens=4, stop_ids=(STOP,))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), MODEL))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


@contextlib.contextmanager
def engine_on(server, folder, model=MODEL, stops=()):
    with connected(server) as client:
        engine = ServerEngine(
            model, SIZES, client, Folders(model, folder), seed=1, temperature=1.0, stops=stops
        )
        yield engine
        engine.close()


def answer(engine):
    """The responses of all slots, by slot."""
    found = []
    while engine.has_work:
        found += engine.step(is_eager=False)
    return {response.slot: response for response in found}


def test_a_slot_holds_a_conversation(params, tmp_path):
    server = StandIn()
    with engine_on(server, tmp_path) as engine:
        with pytest.raises(RuntimeError, match="no weights"):
            engine.submit(0, [4], is_fresh=True, ids=(0, 0, 0, 0))
        engine.swap(engine.place(params), 5)
        assert engine.room(0, 3, is_fresh=True) == 4 and engine.room(0, 14, is_fresh=True) == 2
        engine.submit(0, [4, 5], is_fresh=True, ids=(0, 1, 2, 3))
        with pytest.raises(RuntimeError, match="slot 0 is still answering"):
            engine.submit(0, [4], is_fresh=False, ids=(0, 1, 2, 3))
        engine.submit(1, [9], is_fresh=True, ids=(0, 1, 3, 3))
        first = answer(engine)
        assert first[0].tokens.tolist() == [6, STOP] and first[1].tokens.tolist() == [10, STOP]
        assert first[0].versions.tolist() == [5, 5] and first[0].entropies.tolist() == [0.25, 0.25]
        engine.submit(0, [7], is_fresh=False, ids=(0, 1, 2, 4))
        second = answer(engine)[0]
        assert second.prompt_tokens.tolist() == [4, 5, 6, STOP, 7] and second.finish_reason == "stop"
        assert engine.room(0, 5, is_fresh=False) == 16 - 7 - 5
        assert [body["empg"]["ids"] for body in server.bodies] == [[0, 1, 2, 3], [0, 1, 3, 3], [0, 1, 2, 4]]
        assert server.bodies[2]["max_tokens"] == 4 and server.bodies[2]["stop_token_ids"] == [STOP]
        stats = engine.take_stats()
        assert (stats.responses, stats.sampled_tokens, stats.prompt_tokens) == (3, 6, 1 + 0 + 4)
        engine.release(0)
        assert engine.room(0, 1, is_fresh=False) == 4


def test_published_weights_are_what_is_trained(params, tmp_path):
    server = StandIn()
    with engine_on(server, tmp_path) as engine:
        first, second = engine.place(params), engine.place(jax.tree.map(lambda leaf: leaf + 1, params))
        engine.swap(first, 1)
        engine.swap(second, 2)
        assert not first.path.exists()  # nobody needs it any more
        _, loaded = load_hf(second.path, MODEL)
        for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(loaded), strict=True):
            np.testing.assert_array_equal(np.asarray(leaf) + 1, np.asarray(other))
    assert server.loads == [(str(first.path), "1"), (str(second.path), "2")]
    assert list(tmp_path.iterdir()) == []


def test_adapters_are_merged(params, tmp_path):
    lora = LoraConfig(rank=2)
    model = dataclasses.replace(MODEL, lora=lora)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, make_lora(jax.random.key(1), params, lora))
    with engine_on(StandIn(), tmp_path, model) as engine:
        engine.base = params
        _, loaded = load_hf(engine.place(adapters).path, MODEL)
    merged = merge(params, adapters, lora.scale)
    for leaf, other in zip(jax.tree.leaves(merged), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(other), rtol=1e-6)


def test_an_evaluation_borrows_the_server(params, tmp_path):
    server = StandIn()
    with engine_on(server, tmp_path) as engine:
        engine.swap(engine.place(params), 1)
        engine.submit(0, [4], is_fresh=True, ids=(0, 0, 0, 0))
        with engine.lent(engine.place(params), 2, temperature=0.5, token_filter=NO_FILTER):
            engine.submit(0, [8], is_fresh=True, ids=(1, 0, 0, 0))
            found = answer(engine)[0]
            assert found.tokens.tolist() == [9, STOP] and found.versions.tolist() == [2, 2]
        own = answer(engine)[0]  # ended before the weights of the evaluation came
        assert own.tokens.tolist() == [5, STOP] and own.versions.tolist() == [1, 1]
        engine.submit(0, [7], is_fresh=False, ids=(0, 0, 0, 1))
        assert answer(engine)[0].prompt_tokens.tolist() == [4, 5, STOP, 7]
        with engine.lent(engine.place(params), 1, temperature=1.0):  # the weights that it has
            pass
    assert [version for _, version in server.loads] == ["1", "2", "1"]
    assert [body["temperature"] for body in server.bodies] == [1.0, 0.5, 1.0]


def test_a_stop_string_ends_a_response(params, tmp_path):
    def say_three(body):
        return server.answer({**body, "prompt": [7]}) | {
            "choices": [
                {
                    **server.answer(body)["choices"][0],
                    "token_ids": [8, 9, 10],
                    "logprobs": {"tokens": [], "token_logprobs": [-0.5, -0.25, -0.125]},
                    "empg": {"process": "1", "versions": [1, 1, 1], "entropies": [0.5, 0.25, 0.125]},
                }
            ]
        }

    server = StandIn()
    server.troubles = [say_three, say_three]
    with engine_on(server, tmp_path, stops=("x",)) as engine:
        engine.swap(engine.place(params), 1)
        watch = [lambda tokens: 2, lambda tokens: None]
        for slot in (0, 1):
            engine.submit(slot, [7], is_fresh=True, ids=(0, 0, slot, 0), watch=watch[slot])
        found = answer(engine)
    assert found[0].tokens.tolist() == [8, 9] and found[0].finish_reason == "stop"
    assert found[0].logprobs.tolist() == [-0.5, -0.25]
    assert "no stop token and no stop string" in found[1].failure
    assert server.bodies[0]["stop"] == ["x"]


def test_an_episode_whose_response_failed_is_discarded(params, tmp_path):
    """The reason is the sampler's; nothing else suffers, and nobody learns from it."""
    server = StandIn()
    with (
        engine_on(server, tmp_path) as engine,
        EnvPool("tests.fakes:CountingEnv", {"length": 2}, num_workers=1) as pool,
    ):
        engine.swap(engine.place(params), 1)
        collector = scripted.make_collector(engine, pool, has_deadlines=True)
        server.troubles = [500] * 3
        (lost,) = scripted.run(collector, scripted.attempts(1)).values()
        assert (lost.outcome.status, lost.outcome.reason) == (Status.DISCARDED, "sampler")
        assert "status 500" in lost.outcome.detail
        (kept,) = scripted.run(collector, scripted.attempts(1)).values()
        assert kept.outcome.status == Status.TRAINED and len(kept.turns) == 2


def test_a_slow_server_costs_no_episode_its_time(params, tmp_path):
    now = [0.0]

    def be_slow(body):
        now[0] += 1000.0

    server = StandIn()
    server.troubles = [be_slow] * 2
    with (
        engine_on(server, tmp_path) as engine,
        EnvPool("tests.fakes:CountingEnv", {"length": 2}, num_workers=1) as pool,
    ):
        engine.swap(engine.place(params), 1)
        collector = scripted.make_collector(
            engine, pool, has_deadlines=True, episode_timeout=300.0, timer=lambda: now[0]
        )
        (kept,) = scripted.run(collector, scripted.attempts(1)).values()
    assert kept.outcome.status == Status.TRAINED and collector.served >= 1000.0


def test_seeds_are_those_of_the_place(params):
    assert make_seed(0, (0, 1, 2, 3)) == make_seed(0, (0, 1, 2, 3)) < 2**62
    seeds = {make_seed(*key) for key in ((0, (0, 1, 2, 3)), (1, (0, 1, 2, 3)), (0, (0, 1, 3, 2)))}
    assert len(seeds) == 3


def test_weights_that_a_killed_process_left_are_deleted(tmp_path):
    alive, killed = Folders(MODEL, tmp_path), Folders(MODEL, tmp_path)
    killed._lock.close()  # as the kernel does it
    strange = tmp_path / f"{PREFIX}of-another-version"
    strange.mkdir()
    later = Folders(MODEL, tmp_path)
    assert not killed._home.exists()
    assert sorted(tmp_path.iterdir()) == sorted([alive._home, later._home, strange])
    for folders in (alive, later):
        folders.close()
    assert list(tmp_path.iterdir()) == [strange]
    killed._temporary._finalizer.detach()


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SamplerError, match=r"rollout.weights_dir=.*file cannot be written"):
        Folders(MODEL, tmp_path / "file")
