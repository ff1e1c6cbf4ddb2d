"""A small learning problem for the learner's tests: a model, episodes, an algorithm."""

import functools

import jax
import numpy as np
import optax

from empg_jax.algorithms import make_algorithm
from empg_jax.learner.batching import BatchShape, make_batch
from empg_jax.learner.state import TrainState
from empg_jax.learner.update import make_learner
from empg_jax.models.decoder import DecoderConfig, init_params
from empg_jax.parallel.mesh import make_mesh
from tests.episodes import Episodes

MODEL = DecoderConfig(
    vocab_size=512,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=32,
)
NUM_MINIBATCHES = 2
TEMPERATURE = 0.8


def make_trajectories():
    """Four groups of four: transcripts and windows, of different lengths and returns."""
    episodes = Episodes()
    made = []
    for i in range(16):
        make = episodes.transcript if i % 3 else episodes.window
        lengths = [(4 + i % 2, 2), (3, 1 + i % 3), (5, 2)][: 2 + i % 2]
        made.append(make(lengths, group_id=i // 4, member=i % 4, episode_return=float(i * i % 5)))
    return made


def make_problem(micro_rows):
    """The batch and its layout; rows of 20 tokens."""
    shape = BatchShape(
        trajectories=16,
        turns=3,
        row_tokens=20,
        micro_rows=micro_rows,
        max_rows=16,
        num_minibatches=NUM_MINIBATCHES,
    )
    return make_batch(make_trajectories(), shape, seed=(0,))


@functools.cache
def make_tiny_learner(optimizer=None, *, micro_rows=8, data=1, fsdp=1, has_reference=False, **options):
    """A learner, shared by all tests that ask for the same one; plain gradient descent by default."""
    algorithm = make_algorithm("grpo", modulation="empg", num_minibatches=NUM_MINIBATCHES, **options)
    return make_learner(
        MODEL,
        algorithm,
        optimizer or gradient_descent(),
        make_mesh(data=data, fsdp=fsdp),
        micro_rows=micro_rows,
        temperature=TEMPERATURE,
        has_reference=has_reference,
    )


@functools.cache
def gradient_descent():
    """So that a difference of parameters is a gradient."""
    return optax.sgd(1.0)


@functools.cache
def initial_state(optimizer, seed):
    """A state on the host."""
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(seed), MODEL)
    state = TrainState(params=params, opt_state=jax.jit(optimizer.init)(params), step=jax.numpy.int32(0))
    return jax.device_get(state)


def start(learner, optimizer=None, seed=0):
    """A fresh state on the learner's mesh."""
    return jax.device_put(initial_state(optimizer or gradient_descent(), seed), learner.shardings)


def run_batch(learner, state, host_batch, layout):
    """One pass: score, credit, every mini-batch. Returns the state, scores and the steps' metrics."""
    batch = learner.put(host_batch)
    scores = learner.score(state.params, state.params, batch, np.int32(layout.bounds[-1][1]))
    credit = learner.credit(batch, scores)
    steps = []
    for first, stop in layout.bounds:
        state, metrics = learner.update(state, batch, scores, credit, np.int32(first), np.int32(stop))
        steps.append(jax.device_get(metrics))
    return state, scores, steps


def by_token(batch, values):
    """Values of real tokens keyed by (sequence, position): comparable whatever the layout."""
    values = np.asarray(values)
    places = np.argwhere(batch.segment_ids > 0)
    return {
        (int(batch.sequence_ids[b, t]), int(batch.positions[b, t])): values[b, t]
        for b, t in places
        if batch.positions[b, t] > 0  # what starts a segment is not predicted by anything
    }


def assert_trees_close(found, expected, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance), found, expected
    )


def assert_trees_equal(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, expected)
