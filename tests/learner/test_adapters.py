"""Training adapters on a frozen base, and parameters in other types than float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from empg_jax.algorithms import make_algorithm
from empg_jax.learner.state import apply_updates, init_state, init_trained, make_optimizer, state_shardings
from empg_jax.learner.update import make_learner
from empg_jax.models.axes import param_shardings
from empg_jax.models.decoder import init_params
from empg_jax.models.lora import LoraConfig
from empg_jax.models.quantize import quantize_params
from empg_jax.parallel.mesh import make_mesh
from tests.learner.problems import (
    MODEL,
    NUM_MINIBATCHES,
    assert_trees_close,
    assert_trees_equal,
    gradient_descent,
    make_problem,
)

ADAPTED = dataclasses.replace(MODEL, lora=LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "*_proj")))
ADAM, _ = make_optimizer(
    learning_rate=1e-2, final_learning_rate=1e-3, total_steps=10, schedule="constant", weight_decay=0.1
)


@functools.cache
def base_weights(dtype="float32"):
    """On the host, so that no test can change them for another."""
    config = dataclasses.replace(MODEL, param_dtype=jnp.dtype(dtype))
    return jax.device_get(jax.jit(init_params, static_argnums=1)(jax.random.key(0), config))


@functools.cache
def start_weights():
    """Adapters whose B is not zero, so that both of its halves have a gradient from the first step."""
    fresh = init_trained(jax.random.key(1), ADAPTED)
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: np.float32(0.05 * generator.normal(size=leaf.shape)), fresh)


def make_adapter_learner(base, optimizer=None, *, model=ADAPTED, micro_rows=8, **options):
    mesh = make_mesh(fsdp=options.pop("fsdp", 1), tensor=options.pop("tensor", 1))
    return make_learner(
        model,
        make_algorithm("grpo", modulation="empg", num_minibatches=NUM_MINIBATCHES),
        optimizer or gradient_descent(),
        mesh,
        micro_rows=micro_rows,
        base=jax.device_put(base, param_shardings(mesh, base, model.head_dim)),
        **options,
    )


def steps_of(learner, optimizer, params, host_batch, layout):
    """The state after every mini-batch of a batch, and the steps' metrics; recorded scores."""
    state = init_state(jax.random.key(1), learner.model, optimizer, learner.shardings)
    if params is not None:
        state = dataclasses.replace(state, params=jax.device_put(params, learner.shardings.params))
    batch = learner.put(host_batch)
    scores = learner.recorded_scores(batch)
    credit = learner.credit(batch, scores)
    steps = []
    for first, stop in layout.bounds:
        state, metrics = learner.update(state, batch, scores, credit, np.int32(first), np.int32(stop))
        steps.append(jax.device_get(metrics))
    return state, steps


@pytest.fixture(scope="module")
def one_device():
    learner = make_adapter_learner(base_weights())
    return learner, *steps_of(learner, gradient_descent(), start_weights(), *make_problem(8))


@pytest.mark.slow
def test_adapters_alone_are_trained(one_device):
    learner, state, steps = one_device
    assert_trees_equal(learner.base, base_weights())
    assert steps[0]["grad_norm"] > 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        before = start_weights()
        for key in path:
            before = before[key.key]
        assert np.any(np.asarray(leaf) != before), path


@pytest.mark.slow
def test_splits_over_devices_and_micro_batches_change_nothing(one_device):
    _, expected, expected_steps = one_device
    learner = make_adapter_learner(base_weights(), micro_rows=4, fsdp=4, tensor=2)
    state, steps = steps_of(learner, gradient_descent(), start_weights(), *make_problem(4))
    assert_trees_close(state.params, expected.params, atol=1e-5)
    assert_trees_close(steps, expected_steps, atol=1e-4)
    down, up = (state.params["layers"]["up_proj"][name] for name in ("lora_a", "lora_b"))
    assert down.addressable_shards[0].data.shape == (2, 4, 4)  # in over fsdp = 4
    assert up.addressable_shards[0].data.shape == (2, 4, 16)  # out over tensor = 2


@pytest.mark.slow
def test_the_reference_is_the_base_itself():
    """Fresh adapters score exactly as the empty reference, trained ones do not; moments are float32."""
    base = jax.device_get(quantize_params(jax.tree.map(jnp.asarray, base_weights("bfloat16")), "int8"))
    learner = make_adapter_learner(base, ADAM, has_reference=True)
    host_batch, layout = make_problem(8)
    batch, stop = learner.put(host_batch), np.int32(layout.bounds[-1][1])
    fresh = init_state(jax.random.key(1), ADAPTED, ADAM, learner.shardings)
    scores = learner.score(fresh.params, {}, batch, stop)
    np.testing.assert_allclose(scores.old_logprobs, scores.ref_logprobs, atol=2e-6)
    after = learner.score(jax.device_put(start_weights()), {}, batch, stop)
    np.testing.assert_array_equal(after.ref_logprobs, scores.ref_logprobs)
    assert np.abs(np.asarray(after.old_logprobs - scores.old_logprobs)).max() > 1e-3
    moments = optax.tree_utils.tree_get(fresh.opt_state, "mu")
    assert jax.tree.structure(moments) == jax.tree.structure(fresh.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {np.dtype("float32"), np.dtype("int32")}
    assert_trees_equal(learner.base, base)


def test_a_base_belongs_to_adapters():
    for model, base in ((ADAPTED, None), (MODEL, {})):
        with pytest.raises(ValueError, match=r"a model with adapters \(lora\) needs its base"):
            make_learner(model, make_algorithm("grpo"), ADAM, make_mesh(), micro_rows=8, base=base)


def test_a_critic_is_trained_beside_adapters():
    model = dataclasses.replace(ADAPTED, value_head=True, param_dtype=jnp.bfloat16)
    trained = jax.eval_shape(lambda: init_trained(jax.random.key(0), model))
    assert trained["value_head"]["kernel"].dtype == jnp.float32
    assert trained.keys() == {"layers", "value_head"}


# --------------------------------------------------------------------------------------- precision


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "computed"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_types_of_parameters_and_moments(stored, computed):
    """float32 masters below bfloat16 arithmetic, or bfloat16 parameters: moments are float32 each time."""
    model = dataclasses.replace(MODEL, param_dtype=jnp.dtype(stored), dtype=jnp.dtype(computed))
    learner = make_learner(
        model, make_algorithm("grpo", num_minibatches=NUM_MINIBATCHES), ADAM, make_mesh(), micro_rows=8
    )
    state, steps = steps_of(learner, ADAM, None, *make_problem(8))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(stored)}
    moments = [optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu")]
    assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {jnp.dtype("float32")}
    assert all(np.isfinite(step["grad_norm"]) and step["grad_norm"] > 0 for step in steps)
    before = init_params(jax.random.key(1), model)
    moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), state.params, before)
    assert moved["layers"]["up_proj"]["kernel"] and moved["embed"]["embedding"]


def test_steps_below_the_last_bit_are_not_lost():
    """bfloat16 near 1 has a last bit of 1/128: a step of a tenth of it is taken by a tenth of the numbers."""
    params = {"w": jnp.ones((50, 400), jnp.bfloat16), "x": jnp.ones((3,), jnp.float32)}
    updates = {"w": jnp.full((50, 400), 0.1 / 128), "x": jnp.full((3,), 0.1 / 128)}
    moved = apply_updates(params, updates, jnp.int32(3))
    assert set(np.unique(np.float32(moved["w"]))) == {1.0, 1.0 + 1 / 128}
    assert np.float32(moved["w"]).mean() - 1 == pytest.approx(0.1 / 128, rel=0.1)
    np.testing.assert_array_equal(moved["x"], np.float32(1.0) + np.float32(0.1 / 128))
    again, later = (apply_updates(params, updates, jnp.int32(step)) for step in (3, 4))
    assert_trees_equal(again, moved)
    assert np.any(np.asarray(later["w"] != moved["w"]))


def test_rounding_at_random_keeps_what_needs_none():
    values = jnp.asarray([0.0, -2.5, 1e30, jnp.inf, -jnp.inf], jnp.bfloat16)
    still = apply_updates([values], [jnp.zeros(5)], jnp.int32(0))[0]
    np.testing.assert_array_equal(np.float32(still), np.float32(values))
    assert np.isnan(np.float32(apply_updates([values[:1]], [jnp.full(1, jnp.nan)], jnp.int32(0))[0]))[0]


def test_shardings_of_adapters_split_like_their_matrices():
    mesh = make_mesh(fsdp=4, tensor=2)
    shardings = state_shardings(mesh, ADAPTED, ADAM)
    specs = jax.tree.map(lambda s: s.spec, shardings.params["layers"]["down_proj"])
    assert specs == {"lora_a": jax.P(None, "tensor", None), "lora_b": jax.P(None, None, ("fsdp", "sequence"))}
    moment = optax.tree_utils.tree_get(shardings.opt_state, "mu")["layers"]["down_proj"]["lora_a"]
    assert moment.spec == specs["lora_a"]
