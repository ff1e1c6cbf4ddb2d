"""The train state: optimizer, schedules, and where every leaf lives on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from empg_jax.learner.state import (
    init_state,
    make_optimizer,
    restart_optimizer,
    state_shapes,
    state_shardings,
)
from empg_jax.parallel.mesh import make_mesh
from tests.learner.problems import (
    MODEL,
    assert_trees_close,
    assert_trees_equal,
    initial_state,
    make_problem,
    make_tiny_learner,
    run_batch,
    start,
)

OPTIMIZER, _ = make_optimizer(learning_rate=1e-2, final_learning_rate=1e-3, total_steps=10, weight_decay=0.1)


# --------------------------------------------------------------------------------------- sharding


def shard_shapes(tree):
    return jax.tree.map(lambda leaf: {shard.data.shape for shard in leaf.addressable_shards}, tree)


@pytest.fixture(scope="module")
def one_device():
    learner = make_tiny_learner(OPTIMIZER)
    return run_batch(learner, start(learner, OPTIMIZER), *make_problem(8))


@pytest.mark.slow
def test_eight_devices_hold_an_eighth_or_a_quarter_and_learn_the_same(one_device):
    learner = make_tiny_learner(OPTIMIZER, data=2, fsdp=4)
    state = start(learner, OPTIMIZER)
    host_batch, layout = make_problem(8)
    check_shards(state)
    batch = learner.put(host_batch)
    assert shard_shapes(batch.tokens) == {(len(host_batch.tokens) // 8, 20)}  # rows over data x fsdp
    assert batch.returns.is_fully_replicated
    state, scores, steps = run_batch(learner, state, host_batch, layout)
    check_shards(state)  # and they stay there
    assert shard_shapes(scores.old_logprobs) == {(len(host_batch.tokens) // 8, 20)}
    expected, expected_scores, expected_steps = one_device
    assert_trees_close(scores, expected_scores, atol=2e-5)
    assert_trees_close(steps, expected_steps, atol=1e-4)
    adam, expected_adam = (optax.tree_utils.tree_get(s.opt_state, "mu") for s in (state, expected))
    assert_trees_close(adam, expected_adam, atol=1e-6)
    for found, wanted, moment in zip(
        *map(jax.tree.leaves, (state.params, expected.params, adam)), strict=True
    ):
        # Adam divides by the gradient's size: where that is rounding noise, so is the step.
        sure = np.abs(np.asarray(moment)) > 1e-5
        np.testing.assert_allclose(np.asarray(found)[sure], np.asarray(wanted)[sure], atol=1e-4)
    assert int(state.step) == 2


def check_shards(state):
    """Parameters and both moments are split over fsdp = 4 along their ``embed`` axis."""
    moments = [optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu")]
    for tree in (state.params, *moments):
        shapes = shard_shapes(tree)
        assert shapes["embed"]["embedding"] == {(512, 4)}
        assert shapes["layers"]["up_proj"]["kernel"] == {(2, 4, 32)}
        assert shapes["layers"]["down_proj"]["kernel"] == {(2, 32, 4)}
        assert shapes["layers"]["o_proj"]["kernel"] == {(2, 16, 4)}
        assert shapes["layers"]["q_proj"]["bias"] == {(2, 16)}
        assert shapes["final_norm"]["scale"] == {(16,)}
        assert all(len(leaf.addressable_shards) == 8 for leaf in jax.tree.leaves(tree))
    assert state.step.is_fully_replicated


def test_tensor_parallelism_splits_heads_mlp_and_vocabulary():
    mesh = make_mesh(fsdp=2, tensor=4)
    state = init_state(jax.random.key(0), MODEL, OPTIMIZER, state_shardings(mesh, MODEL, OPTIMIZER))
    shapes = shard_shapes(state.params)
    assert shapes["embed"]["embedding"] == {(128, 8)}
    assert shapes["layers"]["q_proj"]["kernel"] == {(2, 8, 4)}
    assert shapes["layers"]["q_proj"]["bias"] == {(2, 4)}
    assert shapes["layers"]["gate_proj"]["kernel"] == {(2, 8, 8)}
    # The random numbers do not depend on the mesh.
    assert_trees_close(state.params, initial_state(OPTIMIZER, 0).params, atol=1e-6)


def test_shapes_say_what_init_makes():
    learner = make_tiny_learner(OPTIMIZER)
    state = start(learner, OPTIMIZER)
    shapes = state_shapes(MODEL, OPTIMIZER)
    assert jax.tree.structure(shapes) == jax.tree.structure(state) == jax.tree.structure(learner.shardings)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), shapes, state)
    assert all(jax.tree.leaves(same))


def test_a_restarted_optimizer_keeps_the_parameters_and_takes_their_memory():
    learner = make_tiny_learner(OPTIMIZER)
    trained, _, _ = run_batch(learner, start(learner, OPTIMIZER), *make_problem(8))
    before = jax.tree.map(jnp.copy, trained.params)
    state = restart_optimizer(trained.params, OPTIMIZER, learner.shardings)
    assert_trees_equal(state.params, before)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(trained.params))
    assert int(state.step) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(optax.tree_utils.tree_get(state.opt_state, "mu")))
    run_batch(learner, state, *make_problem(8))


# -------------------------------------------------------------------------------------- optimizer


def test_first_moments_in_half_the_memory_learn_alike():
    """A least-squares problem: both come to the same error, and only the first moments are narrow."""
    generator = np.random.default_rng(0)
    inputs, wanted = (jnp.asarray(generator.normal(size=size), jnp.float32) for size in ((64, 8), (64, 4)))
    params = {"layer": {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros((1, 4))}}

    def error(params):
        return jnp.mean((inputs @ params["layer"]["kernel"] + params["layer"]["bias"] - wanted) ** 2)

    errors = {}
    for moments in ("float32", "bfloat16"):
        optimizer, _ = make_optimizer(
            learning_rate=1e-2, final_learning_rate=1e-3, total_steps=150, moments=moments
        )
        state, trained = optimizer.init(params), params
        kinds = {
            name: {leaf.dtype.name for leaf in jax.tree.leaves(optax.tree_utils.tree_get(state, name))}
            for name in ("mu", "nu")
        }
        assert kinds == {"mu": {moments}, "nu": {"float32"}}

        @jax.jit
        def step(trained, state, update=optimizer.update):
            changes, state = update(jax.grad(error)(trained), state, trained)
            return optax.apply_updates(trained, changes), state

        for _ in range(150):
            trained, state = step(trained, state)
        errors[moments] = float(error(trained))
    assert errors["float32"] < 0.95 * float(error(params))
    assert errors["bfloat16"] == pytest.approx(errors["float32"], rel=1e-3)


@pytest.mark.parametrize(
    "schedule, warmup, expected",
    [
        ("constant", 0, {0: 1.0, 5: 1.0, 10: 1.0}),
        ("linear", 0, {0: 1.0, 5: 0.6, 10: 0.2, 15: 0.2}),
        ("linear", 2, {0: 0.0, 1: 0.5, 2: 1.0, 6: 0.6, 10: 0.2}),
        ("cosine", 0, {0: 1.0, 5: 0.6, 10: 0.2}),
        ("cosine", 2, {0: 0.0, 2: 1.0, 6: 0.6, 10: 0.2}),
    ],
)
def test_schedules(schedule, warmup, expected):
    options = dict(learning_rate=1.0, final_learning_rate=0.2, total_steps=10)
    _, rate = make_optimizer(**options, schedule=schedule, warmup_steps=warmup)
    found = {step: float(rate(step)) for step in expected}
    assert found == pytest.approx(expected, abs=1e-6)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule='step' is unknown; choose linear, cosine or constant"):
        make_optimizer(learning_rate=1.0, final_learning_rate=0.1, total_steps=1, schedule="step")


def small_params():
    return {
        "embed": {"embedding": jnp.ones((2, 2))},
        "layers": {
            "norm": {"scale": jnp.ones((3, 2))},
            "proj": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))},
        },
    }


def test_only_matrices_decay():
    """With no gradient, one step of rate 0.1 and decay 0.5 takes 5 % off a matrix and nothing else."""
    optimizer, _ = make_optimizer(
        learning_rate=0.1, final_learning_rate=0.1, total_steps=1, schedule="constant", weight_decay=0.5
    )
    params = small_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["embed"]["embedding"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["layers"]["proj"]["kernel"], -0.05, rtol=1e-6)
    assert not np.any(updates["layers"]["proj"]["bias"]) and not np.any(updates["layers"]["norm"]["scale"])


def test_gradients_are_clipped_by_their_global_norm():
    """28 ones have norm sqrt(28); clipped to 0.5 the first moment is (1 - beta1) * 0.5 / sqrt(28)."""
    optimizer, _ = make_optimizer(
        learning_rate=0.1, final_learning_rate=0.1, total_steps=1, schedule="constant", grad_clip=0.5
    )
    params = small_params()
    _, state = optimizer.update(params, optimizer.init(params), params)
    moment = optax.tree_utils.tree_get(state, "mu")["layers"]["proj"]["bias"]
    np.testing.assert_allclose(moment, 0.1 * 0.5 / np.sqrt(28), rtol=1e-5)
