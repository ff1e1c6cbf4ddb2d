"""The critic's own optimizer: rates, clips, warm-up, a detached head; and that it learns dense rewards."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.algorithms import make_algorithm
from empg_jax.learner.batching import BatchShape, make_batch
from empg_jax.learner.state import init_state, make_optimizer, state_shapes, state_shardings
from empg_jax.learner.update import make_learner
from empg_jax.parallel.mesh import make_mesh
from tests.episodes import TRAINED, Episodes
from tests.learner.problems import MODEL

CRITIC = dataclasses.replace(MODEL, value_head=True)
RATE = 1e-5  # that of a pretrained policy: a head that starts at zero hardly moves at it
SHAPE = BatchShape(trajectories=32, turns=3, row_tokens=24, micro_rows=8, max_rows=32, num_minibatches=2)


def optimizer_of(**critic):
    options = {f"critic_{name}": value for name, value in critic.items()}
    return make_optimizer(
        learning_rate=RATE, final_learning_rate=RATE, total_steps=400, schedule="constant", **options
    )


def bandit(update):
    """Three turns, each with one of four questions in its prompt; the reward is that of the question."""
    episodes, rng, made = Episodes(), np.random.default_rng(update), []
    for member in range(SHAPE.trajectories):
        so_far, turns = np.zeros(0, np.int32), []
        for _ in range(3):
            question = int(rng.integers(4))
            prompt = np.concatenate([so_far, [1, 10 + question]]).astype(np.int32)
            turn = episodes.turn(prompt, 1, reward=float(question))
            answer = np.array([20 + int(rng.integers(4))], np.int32)
            turns.append(dataclasses.replace(turn, response_tokens=answer))
            so_far = np.concatenate([prompt, answer])
        fields = dict(group_id=member // 4, member=member % 4, outcome=TRAINED)
        made.append(episodes.trajectory(turns, episode_return=sum(t.reward for t in turns), **fields))
    return make_batch(made, SHAPE, seed=(update,))


def train(updates, *, detach=False, **critic):
    """Explained variance of every update, and the parameters before and after."""
    algorithm = make_algorithm(
        "ppo",
        num_minibatches=2,
        critic={"detach": detach, "value_clip": None, "lam": 0.0, **critic},
        gamma=0.0,
    )
    optimizer, schedule = optimizer_of(
        learning_rate=critic.get("learning_rate"), warmup_steps=2 * critic.get("warmup_updates", 0)
    )
    learner = make_learner(CRITIC, algorithm, optimizer, make_mesh(), micro_rows=SHAPE.micro_rows)
    state = init_state(jax.random.key(0), CRITIC, optimizer, learner.shardings)
    before, explained = jax.device_get(state.params), []
    for update in range(updates):
        host, layout = bandit(update)
        batch = learner.put(host)
        scores = learner.score(state.params, state.params, batch, np.int32(layout.bounds[-1][1]))
        credit = learner.credit(batch, scores)
        explained.append(float(credit.metrics["explained_variance"]))
        for start, stop in layout.bounds:
            state, _ = learner.update(state, batch, scores, credit, np.int32(start), np.int32(stop))
    return explained, before, jax.device_get(state.params), schedule


def moved(before, after):
    """The largest change in the network below the head, and in the head."""
    change = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    head = max(jax.tree.leaves(change.pop("value_head")))
    return max(jax.tree.leaves(change)), head


@pytest.mark.long
@pytest.mark.slow
def test_dense_rewards_are_explained_with_a_rate_of_its_own():
    """At the policy's rate alone the head stays where it began, and nothing is ever explained."""
    slow, *_ = train(20)
    fast, *_ = train(40, learning_rate=3e-2)
    assert slow[-1] < 0.02
    assert np.mean(fast[-5:]) > 0.3


@pytest.mark.slow
def test_the_warm_up_trains_the_head_alone():
    _, before, after, schedule = train(3, learning_rate=1e-2, warmup_updates=3)
    below, head = moved(before, after)
    assert below == 0 and head > 1e-3
    assert [float(schedule(step)) for step in (0, 5, 6)] == pytest.approx([0.0, 0.0, RATE])


@pytest.mark.long
@pytest.mark.slow
def test_a_detached_head_leaves_the_network_to_the_policy():
    """With advantages of 0 nothing but the critic's loss is left: detached, it stops at the head."""
    for detach in (False, True):
        algorithm = make_algorithm("ppo", num_minibatches=2, critic={"detach": detach, "value_clip": None})
        optimizer, _ = optimizer_of(learning_rate=1e-2)
        learner = make_learner(CRITIC, algorithm, optimizer, make_mesh(), micro_rows=SHAPE.micro_rows)
        state = init_state(jax.random.key(0), CRITIC, optimizer, learner.shardings)
        state = state.replace(params={**state.params, "value_head": _head(state.params["value_head"])})
        before = jax.device_get(state.params)
        host, layout = bandit(0)
        batch = learner.put(host)
        scores = learner.score(state.params, state.params, batch, np.int32(layout.bounds[-1][1]))
        credit = learner.credit(batch, scores)
        credit = credit.replace(advantages=jnp.zeros_like(credit.advantages))
        state, _ = learner.update(state, batch, scores, credit, *map(np.int32, layout.bounds[0]))
        below, head = moved(before, jax.device_get(state.params))
        assert head > 1e-3 and (below == 0) == detach


def _head(head):
    return {**head, "kernel": jnp.full_like(head["kernel"], 0.1)}


def test_each_optimizer_clips_its_own_norm():
    optimizer, _ = make_optimizer(
        learning_rate=1.0,
        final_learning_rate=1.0,
        total_steps=9,
        schedule="constant",
        grad_clip=1.0,
        critic_learning_rate=0.1,
        critic_grad_clip=0.5,
    )
    params = {"value_head": {"kernel": jnp.zeros(2)}, "norm": {"scale": jnp.zeros(2)}}
    state = optimizer.init(params)
    gradient = {"value_head": {"kernel": jnp.full(2, 1e6)}, "norm": {"scale": jnp.full(2, 3.0)}}
    updates, state = optimizer.update(gradient, state, params)
    np.testing.assert_allclose(updates["value_head"]["kernel"], -0.1, rtol=1e-4)
    np.testing.assert_allclose(updates["norm"]["scale"], -1.0, rtol=1e-4)
    leaves = jax.tree.leaves(state)
    first_moments = sorted(
        float(jnp.max(leaf)) for leaf in leaves if leaf.shape == (2,) and leaf.dtype == jnp.float32
    )
    # 0.1 of a gradient whose norm is 1, and of one whose norm is 0.5
    assert any(np.isclose(value, 0.1 * 0.5 / np.sqrt(2), rtol=1e-4) for value in first_moments)
    assert any(np.isclose(value, 0.1 / np.sqrt(2), rtol=1e-4) for value in first_moments)


def test_both_optimizers_are_sharded_like_their_parameters():
    optimizer, _ = optimizer_of(learning_rate=1e-2)
    mesh = make_mesh(fsdp=4)
    shardings, shapes = state_shardings(mesh, CRITIC, optimizer), state_shapes(CRITIC, optimizer)
    assert jax.tree.structure(shardings) == jax.tree.structure(shapes)
    build = functools.partial(init_state, jax.random.key(0), CRITIC, optimizer)
    state = build(shardings)
    kernel = state.params["layers"]["o_proj"]["kernel"]
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    moments = [leaf for path, leaf in leaves if "o_proj" in jax.tree_util.keystr(path) and leaf.ndim == 3]
    assert len(moments) == 2 and all(leaf.sharding == kernel.sharding for leaf in moments)
