"""Score, credit, update: what they compute, and everything that must not change it."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from empg_jax.algorithms import make_algorithm
from empg_jax.learner.outputs import compute_logprobs
from empg_jax.learner.update import make_learner
from empg_jax.models.decoder import forward, init_params, output_embedding
from empg_jax.parallel.mesh import make_mesh
from empg_jax.run.process import CompileCounter
from empg_jax.types import Credit
from tests.learner.problems import (
    MODEL,
    NUM_MINIBATCHES,
    TEMPERATURE,
    assert_trees_close,
    assert_trees_equal,
    by_token,
    gradient_descent,
    make_problem,
    make_tiny_learner,
    run_batch,
    start,
)


@pytest.fixture(scope="module")
def learner():
    return make_tiny_learner()


@pytest.fixture(scope="module")
def problem():
    return make_problem(8)


@pytest.fixture(scope="module")
def expected(learner, problem):
    """State, scores and metrics after one pass with micro-batches of 8 rows on one device."""
    state, scores, steps = run_batch(learner, start(learner), *problem)
    return jax.device_get(state), jax.device_get(scores), steps


@pytest.fixture(scope="module")
def parts(learner, problem):
    """Batch on the device, scores, credit."""
    batch = learner.put(problem[0])
    state = start(learner)
    scores = learner.score(state.params, state.params, batch, np.int32(problem[1].bounds[-1][1]))
    return batch, scores, learner.credit(batch, scores)


def oracle_loss(params, batch, scores, credit, rows):
    """The surrogate of some rows, from full logits of their sampled tokens only.

    Before the first step the ratio is 1, so neither clip is active.
    """
    inputs = (jnp.asarray(x[rows]) for x in (batch.tokens, batch.positions, batch.segment_ids))
    hidden = forward(params, MODEL, *inputs)
    i, t = np.nonzero(batch.loss_mask[rows])
    table = jax.nn.log_softmax(hidden[i, t - 1] @ output_embedding(params).T / TEMPERATURE)
    logprobs = jnp.take_along_axis(table, batch.tokens[rows][i, t][:, None], axis=1)[:, 0]
    old, advantages, weights = (
        x[rows][i, t] for x in (scores.old_logprobs, credit.advantages, credit.loss_weights)
    )
    return -jnp.sum(weights * advantages * jnp.exp(logprobs - old))


def test_an_update_follows_the_gradient_of_the_sampled_tokens(learner, problem, parts):
    host_batch, layout = problem
    batch, scores, credit = parts
    params = jax.device_get(start(learner).params)
    rows = np.flatnonzero(host_batch.minibatch_ids == 0)
    assert len(rows) >= 4
    known = [jax.device_get(x) for x in (scores, credit)]
    value, slope = jax.jit(jax.value_and_grad(lambda p: oracle_loss(p, host_batch, *known, rows)))(params)
    state, metrics = learner.update(start(learner), batch, scores, credit, *map(np.int32, layout.bounds[0]))
    assert abs(value) > 1e-3
    np.testing.assert_allclose(metrics["loss"], value, atol=1e-6)
    assert_trees_close(jax.tree.map(jnp.subtract, params, state.params), slope, atol=1e-6)
    assert float(metrics["tokens"]) == host_batch.loss_mask[rows].sum()
    assert int(state.step) == 1 and metrics["nonfinite"] == metrics["empty"] == 0
    norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(slope)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    entropy = np.asarray(scores.entropies)[rows][host_batch.loss_mask[rows]].mean()
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-5)


@pytest.mark.slow
def test_after_warm_up_nothing_compiles(problem):
    jax.clear_caches()  # of programs that other tests have used
    learner = make_tiny_learner.__wrapped__(micro_rows=4)
    host_batch, layout = make_problem(4)
    state, batch = start(learner), learner.put(host_batch)
    with CompileCounter() as counted:
        learner.warm_up(state, batch)
    assert counted.count == learner.num_programs  # what compiles side by side serves the calls
    programs = (learner.score, learner.credit, learner.update, learner.recorded_scores, learner.logprob_gap)
    compiled = [program._cache_size() for program in programs]
    assert all(compiled)
    batch, state = learner.put(host_batch), start(learner)
    learner.logprob_gap(batch, learner.recorded_scores(batch))
    run_batch(learner, state, host_batch, layout)
    assert [program._cache_size() for program in programs] == compiled


@pytest.mark.slow
@pytest.mark.parametrize("micro_rows", [2, 4])
def test_any_micro_split_gives_the_same_update(expected, problem, micro_rows):
    host_batch, layout = make_problem(micro_rows)
    assert layout.bounds != problem[1].bounds
    learner = make_tiny_learner(micro_rows=micro_rows)
    state, scores, steps = run_batch(learner, start(learner), host_batch, layout)
    for name in ("old_logprobs", "entropies"):
        found, wanted = (
            by_token(b, getattr(s, name)) for b, s in ((host_batch, scores), (problem[0], expected[1]))
        )
        assert found.keys() == wanted.keys()
        sampled = by_token(host_batch, host_batch.loss_mask)  # what is left out of the others is nobody's
        wanted = {key: value for key, value in wanted.items() if sampled[key]}
        np.testing.assert_allclose([found[k] for k in wanted], list(wanted.values()), atol=1e-5)
    assert_trees_close(state.params, expected[0].params, atol=1e-6)
    assert_trees_close(steps, expected[2], atol=1e-5)


def add_garbage(batch):
    """The batch with junk wherever nothing may be read."""
    generator = np.random.default_rng(0)
    fields = {f.name: np.array(getattr(batch, f.name)) for f in dataclasses.fields(batch)}
    padding, untrained = batch.segment_ids == 0, ~batch.loss_mask
    fields["tokens"][padding] = generator.integers(0, MODEL.vocab_size, padding.sum())
    fields["positions"][padding] = generator.integers(0, 20, padding.sum())
    for name, limit in (("trajectory_ids", 16), ("turn_ids", 3)):
        fields[name][untrained] = generator.integers(0, limit, untrained.sum())
    for name in ("behavior_logprobs", "behavior_entropies"):
        fields[name][untrained] = generator.choice([np.nan, np.inf, -1e30, 5.0], untrained.sum())
    return type(batch)(**fields)


def test_garbage_under_masks_changes_nothing(learner, problem, expected):
    host_batch, layout = problem
    state, scores, steps = run_batch(learner, start(learner), add_garbage(host_batch), layout)
    for name in ("old_logprobs", "entropies"):
        found, wanted = (np.asarray(getattr(s, name))[host_batch.loss_mask] for s in (scores, expected[1]))
        np.testing.assert_array_equal(found, wanted)
    assert_trees_equal(state.params, expected[0].params)
    assert_trees_equal(steps, expected[2])


def test_garbage_in_what_credit_says_off_the_mask_changes_nothing(learner, problem, parts):
    host_batch, layout = problem
    batch, scores, credit = parts
    bounds = [np.int32(x) for x in layout.bounds[0]]
    wanted, steps = learner.update(start(learner), batch, scores, credit, *bounds)

    def spoil(values):
        return learner.put(host_batch.replace(tokens=np.where(host_batch.loss_mask, values, np.nan))).tokens

    spoiled = jax.tree.map(spoil, scores), credit.replace(advantages=spoil(credit.advantages))
    found, other_steps = learner.update(start(learner), batch, *spoiled, *bounds)
    assert_trees_equal(found.params, wanted.params)
    assert_trees_equal(other_steps, steps)


def test_score_says_what_compute_logprobs_says(learner, problem, expected):
    batch, _ = problem
    params = jax.device_get(start(learner).params)
    inputs = (batch.tokens, batch.positions, batch.segment_ids)
    found = jax.jit(lambda p: compute_logprobs(p, MODEL, *map(jnp.asarray, inputs), TEMPERATURE))(params)
    real = (batch.minibatch_ids >= 0)[:, None] & (batch.positions > 0) & batch.loss_mask
    for one, other in zip(found, (expected[1].old_logprobs, expected[1].entropies), strict=True):
        np.testing.assert_allclose(np.asarray(one)[real], other[real], atol=1e-5)


def test_nothing_is_scored_beyond_stop(learner, problem, expected):
    host_batch, _ = problem
    batch, params = learner.put(host_batch), start(learner).params
    scores = learner.score(params, params, batch, np.int32(1))
    inside = np.zeros((8, len(host_batch.tokens) // 8), bool)
    inside[:, 0] = True
    inside = inside.ravel()
    for name in ("old_logprobs", "entropies"):
        found = np.asarray(getattr(scores, name))
        np.testing.assert_array_equal(found[~inside], 0)
        np.testing.assert_array_equal(found[inside], getattr(expected[1], name)[inside])


def test_the_reference_is_scored_beside_the_policy(problem, expected):
    learner = make_tiny_learner(has_reference=True, kl_coef=0.1)
    batch, stop = learner.put(problem[0]), np.int32(problem[1].bounds[-1][1])
    state, other = start(learner), start(learner, seed=1)
    scores = learner.score(state.params, other.params, batch, stop)
    swapped = learner.score(other.params, state.params, batch, stop)
    np.testing.assert_allclose(scores.ref_logprobs, swapped.old_logprobs, atol=1e-5)
    np.testing.assert_allclose(swapped.ref_logprobs, scores.old_logprobs, atol=1e-5)
    np.testing.assert_allclose(scores.old_logprobs, expected[1].old_logprobs, atol=1e-5)
    assert np.abs(np.asarray(scores.ref_logprobs) - expected[1].old_logprobs).max() > 0.1


def test_recorded_scores_and_their_gap(learner, problem, parts):
    batch, scores, _ = parts
    recorded = learner.recorded_scores(batch)
    np.testing.assert_array_equal(recorded.old_logprobs, problem[0].behavior_logprobs)
    np.testing.assert_array_equal(recorded.entropies, problem[0].behavior_entropies)
    mean, largest = learner.logprob_gap(batch, scores)
    mask = problem[0].loss_mask
    gap = np.abs(np.asarray(scores.old_logprobs) - problem[0].behavior_logprobs)[mask]
    np.testing.assert_allclose([mean, largest], [gap.mean(), gap.max()], rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing(learner, problem, parts, value):
    batch, scores, credit = parts
    advantages = np.array(credit.advantages)
    row = np.flatnonzero(problem[0].minibatch_ids == 0)[0]
    advantages[row, np.flatnonzero(problem[0].loss_mask[row])[0]] = value
    state = start(learner)
    before = jax.device_get(state)
    bounds = [np.int32(x) for x in problem[1].bounds[0]]
    spoiled = Credit(jnp.asarray(advantages), credit.loss_weights, credit.metrics)
    after, metrics = learner.update(state, batch, scores, spoiled, *bounds)
    assert metrics["nonfinite"] == 1
    assert_trees_equal(after, before)
    healthy, metrics = learner.update(after, batch, scores, credit, *bounds)  # and training goes on
    assert metrics["nonfinite"] == 0 and int(healthy.step) == 1


def test_clip_ranges_of_the_credit_reach_the_loss(learner, problem, parts):
    """Every ratio is 1.1, which the objective's own ranges hold and half of them on even turns do not."""
    batch, scores, credit = parts
    mask, even = problem[0].loss_mask, problem[0].turn_ids % 2 == 0
    scores = scores.replace(old_logprobs=scores.old_logprobs - jnp.float32(np.log(1.1)))
    bounds = [np.int32(x) for x in problem[1].bounds[0]]
    rows = problem[0].minibatch_ids == 0
    for scale, held in ((np.ones(mask.shape), mask & False), (np.where(even, 0.4, 1.0), mask & even)):
        scaled = credit.replace(clip_scale=jnp.asarray(scale, jnp.float32))
        _, metrics = learner.update(start(learner), batch, scores, scaled, *bounds)
        clipped = (held & (np.asarray(credit.advantages) > 0))[rows]
        assert clipped.any() == held.any()
        np.testing.assert_allclose(metrics["clip_fraction"], clipped.sum() / mask[rows].sum(), rtol=1e-5)


def test_metrics_of_trained_tokens_leave_out_what_the_loss_does_not_cover(learner, problem, parts):
    """The loss covers the even turns; entropies are those of all sampled tokens."""
    batch, scores, credit = parts
    rows, mask = problem[0].minibatch_ids == 0, problem[0].loss_mask
    covered = mask & (problem[0].turn_ids % 2 == 0)
    ratios = np.where(covered, np.float32(0.2), np.float32(1.0))
    moved = scores.replace(old_logprobs=scores.old_logprobs + ratios)
    weights = credit.replace(loss_weights=jnp.where(covered, credit.loss_weights, 0))
    bounds = [np.int32(x) for x in problem[1].bounds[0]]
    _, metrics = learner.update(start(learner), batch, moved, weights, *bounds)
    assert float(metrics["tokens"]) == covered[rows].sum() < mask[rows].sum() == float(metrics["sampled"])
    np.testing.assert_allclose(metrics["ratio"], np.exp(-0.2), rtol=1e-4)
    entropy = np.asarray(scores.entropies)[rows][mask[rows]].mean()
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-5)


@pytest.mark.parametrize("loss", ["gspo", "turn_ratio_clip"])
def test_a_token_that_is_left_out_moves_no_ratio_of_its_unit(loss, problem):
    """The sampler's word for the first token of each turn with several is far off, so mis rejects it."""
    options = {"loss": loss, "correction": {"kind": "mis"}}
    algorithm = make_algorithm("grpo", num_minibatches=NUM_MINIBATCHES, **options)
    mesh = make_mesh(data=1, fsdp=1)
    learner = make_learner(MODEL, algorithm, gradient_descent(), mesh, micro_rows=8, temperature=TEMPERATURE)
    batch, state = learner.put(problem[0]), start(learner)
    scores = learner.score(state.params, state.params, batch, np.int32(problem[1].bounds[-1][1]))
    mask, turns = problem[0].loss_mask, problem[0].turn_ids
    same = np.zeros_like(mask)
    same[:, 1:] = mask[:, 1:] & mask[:, :-1] & (turns[:, 1:] == turns[:, :-1])
    rejected = mask & ~same & np.roll(same, -1, axis=1)
    sampler = np.where(rejected, np.float32(-20), np.asarray(scores.old_logprobs))
    batch = learner.put(dataclasses.replace(problem[0], behavior_logprobs=sampler))
    credit = learner.credit(batch, scores)
    assert rejected.any() and not np.asarray(credit.loss_weights)[rejected].any()
    bounds = [np.int32(x) for x in problem[1].bounds[0]]
    gradients = []
    for change in (0.0, 1.0):
        moved = scores.replace(old_logprobs=scores.old_logprobs - jnp.where(rejected, jnp.float32(change), 0))
        after, _ = learner.update(start(learner), batch, moved, credit, *bounds)
        gradients.append(jax.device_get(after.params))
    assert_trees_equal(*gradients)


@pytest.mark.slow
def test_an_update_without_trained_tokens_changes_nothing(problem):
    """Groups of equal returns are dropped; momentum would still move the weights."""
    optimizer = optax.sgd(1.0, momentum=0.9)
    learner = make_tiny_learner(optimizer, drop_uniform="group")
    state, *_ = run_batch(learner, start(learner, optimizer), *problem)
    before = jax.device_get(state)
    flat = dataclasses.replace(problem[0], returns=np.ones_like(problem[0].returns))
    state, _, steps = run_batch(learner, state, flat, problem[1])
    assert_trees_equal(jax.device_get(state), before)
    assert [(step["loss"], step["empty"], step["nonfinite"]) for step in steps] == [(0, 1, 0)] * 2


def test_an_empty_range_adds_no_gradient(learner, parts):
    state, metrics = learner.update(start(learner), *parts, np.int32(0), np.int32(0))
    assert_trees_equal(state.params, start(learner).params)
    assert metrics["loss"] == metrics["grad_norm"] == 0


def test_the_state_is_donated(learner, parts):
    state = start(learner)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        new, _ = learner.update(state, *parts, np.int32(0), np.int32(1))
    assert [str(w.message) for w in caught] == []
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, parts)))


def test_rows_that_the_mesh_cannot_divide_are_refused():
    with pytest.raises(ValueError, match=r"micro-batch of 6 rows cannot be divided over data x fsdp = 4"):
        make_tiny_learner(micro_rows=6, data=2, fsdp=2)


# ------------------------------------------------------------------------------------------ memory


def temporary_bytes(num_layers, remat):
    """Temporary memory of the compiled gradient; nothing is allocated."""
    model = dataclasses.replace(
        MODEL, num_layers=num_layers, remat=remat, hidden_size=32, head_dim=8, intermediate_size=64
    )
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), model))
    integers = jax.ShapeDtypeStruct((4, 128), jnp.int32)

    def loss(params, inputs):
        return jnp.sum(forward(params, model, inputs, inputs, inputs))

    compiled = jax.jit(jax.grad(loss)).lower(shapes, integers).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.long
@pytest.mark.slow
def test_memory_grows_slowly_with_layers():
    few, many, dots = (temporary_bytes(n, remat=r) for n, r in ((2, "full"), (10, "full"), (10, "dots")))
    block_input = 4 * 128 * 32 * 4  # bytes that rematerialization has to keep of each layer
    assert many - few < 8 * 4 * block_input
    assert dots - few > 3 * (many - few)
    assert temporary_bytes(10, remat="none") > dots
