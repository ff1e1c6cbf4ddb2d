"""The critic: its value head in the parameters, its scores, and its gradient in the update."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.algorithms import make_algorithm
from empg_jax.hf.load import load_hf, save_hf
from empg_jax.learner.fingerprint import policy_checksum
from empg_jax.learner.state import TrainState, init_state, state_shapes
from empg_jax.learner.update import make_learner
from empg_jax.models.decoder import forward, init_params
from empg_jax.parallel.mesh import make_mesh
from tests.learner.problems import MODEL, TEMPERATURE, assert_trees_close, gradient_descent, make_problem

CRITIC = dataclasses.replace(MODEL, value_head=True)
COEF, CLIP = 0.25, 0.1


@pytest.fixture(scope="module")
def problem():
    return make_problem(8)


@pytest.fixture(scope="module")
def learner():
    algorithm = make_algorithm("ppo", num_minibatches=2, critic={"value_coef": COEF, "value_clip": CLIP})
    return make_learner(
        CRITIC, algorithm, gradient_descent(), make_mesh(data=2), micro_rows=8, temperature=TEMPERATURE
    )


def make_params():
    """Random parameters with a value head that says something."""
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), CRITIC)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(params["value_head"]))
    head = {
        "kernel": jax.random.normal(jax.random.key(1), (MODEL.hidden_size,)) / 4,
        "bias": jnp.float32(0.3),
    }
    return jax.device_get({**params, "value_head": head})


def start(learner, params):
    state = TrainState(params=params, opt_state=gradient_descent().init(params), step=jnp.int32(0))
    return jax.device_put(state, learner.shardings)


def test_the_value_head_is_there_only_for_a_critic():
    assert "value_head" not in jax.eval_shape(lambda: init_params(jax.random.key(0), MODEL))
    shapes = state_shapes(CRITIC, gradient_descent()).params["value_head"]
    assert (shapes["kernel"].shape, shapes["bias"].shape) == ((MODEL.hidden_size,), ())
    plain, critic = (init_params(jax.random.key(0), config) for config in (MODEL, CRITIC))
    del critic["value_head"]
    jax.tree.map(np.testing.assert_array_equal, plain, critic)


def test_scores_hold_the_value_of_the_state_before_the_token(learner, problem):
    batch, layout = problem
    params = make_params()
    state = start(learner, params)
    scores = learner.score(state.params, state.params, learner.put(batch), np.int32(layout.bounds[-1][1]))
    hidden = jax.jit(forward, static_argnums=1)(
        params, CRITIC, *map(jnp.asarray, (batch.tokens, batch.positions, batch.segment_ids))
    )
    values = np.asarray(hidden @ params["value_head"]["kernel"] + params["value_head"]["bias"])
    i, t = np.nonzero(batch.loss_mask)
    np.testing.assert_allclose(np.asarray(scores.values)[i, t], values[i, t - 1], atol=1e-5)


@pytest.mark.slow
def test_the_update_follows_the_gradient_of_the_value_loss(learner, problem):
    """With advantages of 0 only the critic is left; its loss reaches the head and the network below."""
    host, layout = problem
    batch, params = learner.put(host), make_params()
    state = start(learner, params)
    scores = learner.score(state.params, state.params, batch, np.int32(layout.bounds[-1][1]))
    moved = scores.replace(values=jax.device_put(scores.values + 0.2, scores.values.sharding))
    credit = learner.credit(batch, scores)
    credit = credit.replace(advantages=jnp.zeros_like(credit.advantages))
    rows = np.flatnonzero(host.minibatch_ids == 0)
    i, t = np.nonzero(host.loss_mask[rows])
    old, targets, weights = (
        np.asarray(x)[rows][i, t] for x in (moved.values, credit.value_targets, credit.loss_weights)
    )

    def oracle(params):
        inputs = (jnp.asarray(x[rows]) for x in (host.tokens, host.positions, host.segment_ids))
        hidden = forward(params, CRITIC, *inputs)[i, t - 1]
        values = hidden @ params["value_head"]["kernel"] + params["value_head"]["bias"]
        near = jnp.clip(values, old - CLIP, old + CLIP)
        return jnp.sum(weights * COEF * jnp.maximum((values - targets) ** 2, (near - targets) ** 2) / 2)

    value, slope = jax.jit(jax.value_and_grad(oracle))(params)
    assert all(jnp.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(slope["value_head"]))
    assert jnp.abs(slope["layers"]["o_proj"]["kernel"]).max() > 1e-5
    new, metrics = learner.update(state, batch, moved, credit, *map(np.int32, layout.bounds[0]))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert_trees_close(jax.tree.map(np.subtract, params, jax.device_get(new.params)), slope, atol=1e-5)
    assert metrics["value_loss"] > 0 and np.isfinite(credit.metrics["explained_variance"])


def test_after_warm_up_nothing_compiles(learner, problem):
    host, layout = problem
    state = init_state(jax.random.key(0), CRITIC, gradient_descent(), learner.shardings)
    learner.warm_up(state, learner.put(host))
    programs = (learner.score, learner.credit, learner.update)
    compiled = [program._cache_size() for program in programs]
    state, batch = start(learner, make_params()), learner.put(host)
    scores = learner.score(state.params, state.params, batch, np.int32(layout.bounds[-1][1]))
    recorded = learner.recorded_scores(batch)
    mixed = scores.replace(old_logprobs=recorded.old_logprobs, entropies=recorded.entropies)
    for given in (scores, mixed):
        credit = learner.credit(batch, given)
        state, _ = learner.update(state, batch, given, credit, *map(np.int32, layout.bounds[0]))
    assert learner.needs_score
    assert [program._cache_size() for program in programs] == compiled


def test_a_model_without_value_head_is_refused():
    with pytest.raises(ValueError, match="the model needs value_head=True"):
        make_learner(MODEL, make_algorithm("ppo"), gradient_descent(), make_mesh(), micro_rows=4)


def test_the_export_leaves_the_value_head_out(tmp_path):
    config = dataclasses.replace(CRITIC, num_kv_heads=4)
    params = init_params(jax.random.key(0), config)
    save_hf(params, config, tmp_path / "model")
    loaded_config, loaded = load_hf(tmp_path / "model")
    assert not loaded_config.value_head and "value_head" not in loaded
    jax.tree.map(
        np.testing.assert_array_equal, loaded, {k: v for k, v in params.items() if k != "value_head"}
    )
    # Loaded for a critic, the rest of the network is found as well.
    assert "value_head" not in load_hf(tmp_path / "model", config)[1]


def test_a_reference_needs_no_value_head(problem):
    """As that of adapters, which is the base model."""
    algorithm = make_algorithm("ppo", num_minibatches=2, kl_coef=0.1)
    learner = make_learner(
        CRITIC,
        algorithm,
        gradient_descent(),
        make_mesh(data=2),
        micro_rows=8,
        temperature=TEMPERATURE,
        has_reference=True,
    )
    params = make_params()
    reference = {name: leaf for name, leaf in params.items() if name != "value_head"}
    batch, layout = problem
    scores = learner.score(params, reference, learner.put(batch), np.int32(layout.bounds[-1][1]))
    np.testing.assert_allclose(scores.ref_logprobs, scores.old_logprobs, atol=1e-5)
    assert scores.values is not None and np.any(np.asarray(scores.values))


def test_a_critic_leaves_the_policys_checksum():
    """A run with a critic starts from the same policy as one without, so that they form a pair."""
    plain, critic = (init_params(jax.random.key(3), config) for config in (MODEL, CRITIC))
    assert "value_head" in critic
    assert policy_checksum(plain) == policy_checksum(critic)
    critic["final_norm"]["scale"] = critic["final_norm"]["scale"] + 1e-6
    assert policy_checksum(plain) != policy_checksum(critic)
