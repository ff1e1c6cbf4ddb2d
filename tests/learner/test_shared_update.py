"""An update over rows with shared beginnings is the update without them: log-probs, gradients, steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.learner.batching import BatchShape, find_tokens, make_batch
from empg_jax.learner.outputs import compute_outputs
from empg_jax.learner.state import init_trained
from empg_jax.learner.update import make_learner
from empg_jax.models.attention import tiles
from empg_jax.models.decoder import RopeScaling, init_params
from empg_jax.models.lora import LoraConfig, combine
from empg_jax.models.moe import MoeConfig
from empg_jax.parallel.mesh import make_mesh
from tests.episodes import Episodes
from tests.learner import problems
from tests.learner.problems import MODEL, assert_trees_close, start
from tests.learner.test_sharing import make_group

ROW = 64
PLAIN = BatchShape(
    trajectories=16,
    turns=3,
    row_tokens=ROW,
    micro_rows=4,
    max_rows=32,
    num_minibatches=problems.NUM_MINIBATCHES,
)


@pytest.fixture(scope="module", autouse=True)
def _several_tiles():
    """Rows of these tests are short; with tiles of 16 they have tiles to leave out."""
    whole, tiles.TILE = tiles.TILE, 16
    yield
    tiles.TILE = whole


@functools.cache
def make_problem(devices=0):
    """The same groups packed into rows of 64, or into one long row per device with shared beginnings."""
    episodes = Episodes()
    rules, made = episodes.draw(18), []
    for group in range(4):
        own = [(group % 2 == 0, [(m, 2 + m), (2, 1 + m)][: 1 + m % 2]) for m in range(4)]
        made += make_group(episodes, rules, episodes.draw(12 * (group % 3)), own, group)
    made = [dataclasses.replace(t, episode_return=float(i * i % 5)) for i, t in enumerate(made)]
    joined = 4 // devices if devices else 1
    shape = dataclasses.replace(
        PLAIN, micro_rows=devices or 4, row_tokens=ROW * joined, shares_prefix=devices > 0
    )
    batch, layout = make_batch(made, shape, seed=(0,))
    assert (layout.num_shared > 150) == bool(devices)
    return batch, layout


def line_up(plain, shared, values):
    """Values of the plain layout's tokens at the places of the shared one, where tokens are sampled."""
    places = find_tokens(plain, shared)
    return np.where(shared.loss_mask, np.asarray(values).ravel()[np.maximum(places, 0)], 0)


# ---------------------------------------------------------------------------- models, by one derivative

VARIANTS = {
    "experts": dict(moe=MoeConfig(num_experts=4, top_k=2, expert_size=8)),
    "adapters": dict(
        lora=LoraConfig(rank=2, alpha=4.0, targets=("*_proj",)),
        qk_norm=True,
        qkv_bias=False,
        rope_scaling=RopeScaling(2.0, 1.0, 4.0, 32),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", [pytest.param("experts", marks=pytest.mark.long), "adapters"])
def test_log_probs_and_gradients_of_a_model(variant):
    model = dataclasses.replace(MODEL, **VARIANTS[variant])
    base = {}
    if model.lora is not None:
        base = jax.jit(lambda: init_params(jax.random.key(0), dataclasses.replace(model, lora=None)))()
    noise = jax.jit(lambda: init_trained(jax.random.key(1), model))()
    # No matrix of adapters is zero, as half of them are at the start.
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), noise)

    @functools.partial(jax.jit, static_argnames="is_shared")
    def run(params, batch, weights, is_shared):
        def loss_of(params):
            logprobs, entropies, _ = compute_outputs(
                combine(base, params),
                model,
                batch.tokens,
                batch.positions,
                batch.segment_ids,
                trunk_ids=batch.trunk_ids if is_shared else None,
                loss_mask=batch.loss_mask,
            )
            kept = jnp.where(batch.loss_mask, logprobs, 0), jnp.where(batch.loss_mask, entropies, 0)
            return jnp.sum(weights * (kept[0] + 0.1 * kept[1])), kept

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    (plain, _), (shared, _) = make_problem(), make_problem(1)
    weights = np.random.default_rng(0).normal(size=plain.tokens.shape).astype(np.float32)
    (_, expected), slopes = run(params, plain, weights, is_shared=False)
    (_, found), slopes_shared = run(params, shared, line_up(plain, shared, weights), is_shared=True)
    for ours, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, line_up(plain, shared, exact), atol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slopes))
    assert largest > 0.1
    assert_trees_close(slopes_shared, slopes, atol=1e-5 * largest)


# ------------------------------------------------------------------------------------ the learner's steps


def run_steps(learner, problem):
    """Every optimizer step of a batch; the state and the first scores, and the compiled updates."""
    host, layout = problem
    state, scores, steps = problems.run_batch(learner, start(learner), host, layout)
    return jax.device_get(state.params), jax.device_get(scores), steps


@functools.cache
def make_plain():
    return run_steps(problems.make_tiny_learner(micro_rows=4), make_problem())


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [{}, pytest.param(dict(data=2), marks=pytest.mark.long), dict(fsdp=2, tensor=2)],
    ids=["one", "data", "split"],
)
def test_optimizer_steps_of_the_learner(axes):
    """Plain gradient descent of rate 1, so that parameters show the gradients."""
    devices = axes.get("data", 1) * axes.get("fsdp", 1)
    learner = make_learner(
        MODEL,
        problems.make_algorithm("grpo", modulation="empg", num_minibatches=problems.NUM_MINIBATCHES),
        problems.gradient_descent(),
        make_mesh(**axes),
        micro_rows=devices,
        temperature=problems.TEMPERATURE,
        shares_prefix=True,
    )
    (plain, _), problem = make_problem(), make_problem(devices)
    params, scores, steps = make_plain()
    found, found_scores, found_steps = run_steps(learner, problem)
    for name in ("old_logprobs", "entropies"):
        ours = np.where(problem[0].loss_mask, getattr(found_scores, name), 0)
        np.testing.assert_allclose(ours, line_up(plain, problem[0], getattr(scores, name)), atol=1e-5)
    assert_trees_close(found, params, atol=1e-5)
    assert len(found_steps) == len(steps) == problems.NUM_MINIBATCHES
    for ours, exact in zip(found_steps, steps, strict=True):
        assert_trees_close(ours, exact, atol=1e-5, rtol=1e-5)


def test_time_cannot_be_split():
    with pytest.raises(
        ValueError, match=r"sequence=2: rows with shared beginnings cannot be split over time"
    ):
        make_learner(
            MODEL,
            problems.make_algorithm("grpo"),
            problems.gradient_descent(),
            make_mesh(sequence=2),
            micro_rows=1,
            shares_prefix=True,
        )
