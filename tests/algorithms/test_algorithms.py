"""Whole algorithms: conformance over the table, composition, mini-batches, devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from empg_jax import algorithms as al
from empg_jax.algorithms.aggregation import AGGREGATIONS, minibatch_weights
from empg_jax.algorithms.credit import compute_worth, make_turns
from empg_jax.types import Credit

from .batches import B, K, N, T, make_batch


def take_rows(tree, rows):
    """The rows' part of the per-token carriers; the trajectory table stays whole."""
    per_row = {"minibatch_ids"}

    def pick(name, x):
        return x[rows] if x is not None and (x.shape[:2] == (B, T) or name in per_row) else x

    return dataclasses.replace(
        tree, **{f.name: pick(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree)}
    )


@functools.cache
def compiled(name, num_minibatches=2):
    algorithm = al.make_algorithm(name, num_minibatches=num_minibatches)
    return jax.jit(algorithm.credit), jax.jit(jax.value_and_grad(weighted(algorithm), has_aux=True))


def weighted(algorithm):
    def total(logprobs, entropies, batch, scores, credit):
        scores = scores.replace(clip_scale=credit.clip_scale)
        loss, metrics = algorithm.loss(logprobs, entropies, batch, scores, credit.advantages)
        return jnp.sum(loss * credit.loss_weights), (loss, metrics)

    return total


@pytest.mark.parametrize("name", al.ALGORITHMS)
def test_every_algorithm_has_the_shapes_of_the_contract(name):
    batch, scores, logprobs, entropies = make_batch()
    algorithm = al.make_algorithm(name, num_minibatches=2)
    credit = jax.eval_shape(algorithm.credit, batch, scores)
    assert isinstance(credit, Credit)
    assert credit.advantages.shape == credit.loss_weights.shape == (B, T)
    assert credit.advantages.dtype == credit.loss_weights.dtype == jnp.float32
    assert all(value.shape == () and value.dtype == jnp.float32 for value in credit.metrics.values())
    rows, row_scores = take_rows(batch, slice(0, 2)), take_rows(scores, slice(0, 2))
    advantages = jnp.zeros((2, T))
    loss, metrics = jax.eval_shape(algorithm.loss, logprobs[:2], entropies[:2], rows, row_scores, advantages)
    assert loss.shape == (2, T) and all(value.shape == (2, T) for value in metrics.values())
    assert (algorithm.value_loss is None) == (credit.value_targets is None)
    if algorithm.value_loss is not None:
        loss, more = jax.eval_shape(algorithm.value_loss, entropies[:2], rows, row_scores, advantages)
        assert loss.shape == (2, T) and all(value.shape == (2, T) for value in more.values())
        assert not metrics.keys() & more.keys()
    for metric in (*credit.metrics, *metrics):
        assert metric == metric.lower() and " " not in metric


# Every estimator and every objective once, each modulation among them.
SAMPLE = (
    "reinforce",
    "grpo_empg",
    "grpo_turn_rows",
    "gspo_aem",
    "cispo_empg",
    "sapo_aem",
    "gigpo",
    "reinforce_pp_empg",
    "ppo_aem",
    "turn_ppo_aem",
)


@pytest.mark.parametrize("name", SAMPLE)
def test_algorithms_run_and_junk_under_the_mask_is_harmless(name):
    credit_of, loss_of = compiled(name)
    batch, scores, logprobs, entropies = make_batch()
    credit = credit_of(batch, scores)
    (value, (loss, metrics)), gradient = loss_of(logprobs, entropies, batch, scores, credit)
    assert np.isfinite(value) and np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    off = ~np.asarray(batch.loss_mask)
    for array in (credit.advantages, credit.loss_weights, loss, gradient):
        assert not np.asarray(array)[off].any()
    assert all(np.isfinite(v).all() for v in (*credit.metrics.values(), *metrics.values()))

    dirty_batch, dirty_scores, dirty_logprobs, dirty_entropies = make_batch(junk=np.nan)
    dirty = credit_of(dirty_batch, dirty_scores)
    jax.tree.map(np.testing.assert_array_equal, dirty, credit)
    (same, _), same_gradient = loss_of(dirty_logprobs, dirty_entropies, dirty_batch, dirty_scores, dirty)
    assert same == value
    np.testing.assert_array_equal(same_gradient, gradient)


@pytest.mark.parametrize("name", ["gspo_aem", "grpo_empg"])
def test_micro_batches_add_up(name):
    """A micro-batch of the rows of one mini-batch, or of any others, adds its part and nothing else."""
    credit_of, loss_of = compiled(name)
    batch, scores, logprobs, entropies = make_batch()
    credit = credit_of(batch, scores)
    (whole, _), gradient = loss_of(logprobs, entropies, batch, scores, credit)
    total, parts = 0.0, []
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)):
        part = Credit(credit.advantages[rows], credit.loss_weights[rows], {})
        row_arrays = (logprobs[rows], entropies[rows], take_rows(batch, rows), take_rows(scores, rows))
        (value, _), part_gradient = loss_of(*row_arrays, part)
        total, parts = total + value, [*parts, part_gradient]
    np.testing.assert_allclose(total, whole, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate(parts), gradient, atol=1e-6)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_each_mini_batch_has_its_own_weights(mode):
    batch, *_ = make_batch()
    split = (batch.loss_mask, batch.minibatch_ids, 2)
    weights = np.asarray(minibatch_weights(*split, mode=mode, sequence_ids=batch.sequence_ids))
    for rows in (np.array([0, 2]), np.array([1])):
        alone = al.loss_weights(batch.loss_mask[rows], mode=mode, sequence_ids=batch.sequence_ids[rows])
        np.testing.assert_allclose(weights[rows], alone, rtol=1e-6)
    assert not weights[3:].any()


def test_credit_is_the_composition_of_the_public_functions():
    batch, scores, *_ = make_batch()
    credit = jax.jit(al.make_algorithm("grpo_empg").credit)(batch, scores)

    @jax.jit
    def compose(batch, scores):
        groups = jnp.where(batch.trajectory_mask, batch.group_ids, -1)
        place = (batch.loss_mask, batch.trajectory_ids, batch.turn_ids)
        entropies, mask = al.compute_turn_entropies(scores.entropies, *place, num_trajectories=N, num_turns=K)
        base = jnp.broadcast_to(al.grpo(batch.returns, groups)[:, None], (N, K))
        return al.turns_to_tokens(al.empg(base, entropies, mask, group_ids=groups), *place)

    np.testing.assert_allclose(credit.advantages, compose(batch, scores), atol=1e-6)
    np.testing.assert_allclose(credit.metrics["modulation_mean"], 1, atol=1e-5)
    np.testing.assert_allclose(credit.metrics["advantage_mean"], 0, atol=1e-6)
    np.testing.assert_allclose(credit.metrics["mixed_groups"], 2 / 3, atol=1e-6)


def test_switched_off_modulation_is_the_base():
    batch, scores, *_ = make_batch()
    base = compiled("reinforce_pp", 1)[0](batch, scores).advantages
    for off in ({"modulation": "empg", "empg": {"k": 0, "zeta": 0, "center": "none"}}, {"aem": {"lam": 0}}):
        algorithm = al.make_algorithm("reinforce_pp", **({"modulation": "aem"} | off))
        np.testing.assert_array_equal(jax.jit(algorithm.credit)(batch, scores).advantages, base)


def test_a_group_without_contrast_has_no_advantages_that_the_modulation_could_turn():
    batch, scores, *_ = make_batch()
    alike = dataclasses.replace(batch, returns=jnp.ones_like(batch.returns))
    credit = jax.jit(al.make_algorithm("grpo", modulation="empg", empg={"zeta": 0.5}).credit)(alike, scores)
    assert np.any(credit.advantages)  # of the bonus alone
    assert credit.metrics["advantage_sign_changed"] == credit.metrics["advantage_changed_2x"] == 0


def test_reinforce_pp_tokens_follow_the_padded_form():
    """One packed sequence per trajectory: gathered rows through `reinforce_pp` give the same."""
    batch, scores, *_ = make_batch()
    estimate = al.parts.reinforce_pp(gamma=0.9, reward_kl_coef=0.3)

    def tokens(batch, scores):
        return estimate(batch, scores, compute_worth(batch, make_turns(batch, scores), ())).advantages

    result = np.asarray(jax.jit(tokens)(batch, scores))
    mask, owner = np.asarray(batch.loss_mask), np.asarray(batch.trajectory_ids)
    rewards, valid = np.zeros((6, T), np.float32), np.zeros((6, T), bool)
    for i in range(6):
        places = mask & (owner == i)
        n = places.sum()
        valid[i, :n] = True
        rewards[i, :n] = -0.3 * np.asarray(scores.old_logprobs - scores.ref_logprobs)[places]
        rewards[i, n - 1] += batch.returns[i]
    expected = np.asarray(al.reinforce_pp(rewards, valid, gamma=0.9))
    for i in range(6):
        np.testing.assert_allclose(result[mask & (owner == i)], expected[i][valid[i]], atol=1e-5)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8)])
def test_ppo_estimates_advantages_along_each_trajectory(gamma, lam):
    """Against a loop over the tokens of one trajectory after another, wherever the packing put them."""
    batch, scores, *_ = make_batch(junk=np.nan)
    # Trajectory 1 stands in row 0 beside trajectory 0; its second turn moves to a row of its own.
    moved = np.array(batch.trajectory_ids) == 1
    moved &= (np.array(batch.turn_ids) == 1) & np.array(batch.loss_mask)
    streams = {"loss_mask", "trajectory_ids", "turn_ids"}
    fields = {name: np.array(getattr(batch, name)) for name in streams}
    score_fields = {
        name: np.array(getattr(scores, name)) for name in ("values", "old_logprobs", "ref_logprobs")
    }
    assert moved[0].any() and not fields["loss_mask"][5].all()
    for table in (fields, score_fields):
        for stream in table.values():
            stream[6][moved[0]] = stream[0][moved[0]]
    fields["loss_mask"][0][moved[0]] = False
    fields |= {"minibatch_ids": np.zeros(B, np.int32)}
    batch, scores = batch.replace(**fields), scores.replace(**score_fields)

    options = {"gamma": gamma, "critic": {"lam": lam}, "reward_kl_coef": 0.3}
    credit = jax.jit(al.make_algorithm("ppo", **options).credit)(batch, scores)
    found, targets = np.zeros((B, T)), np.zeros((B, T))
    for i in range(6):
        owned = fields["loss_mask"] & (fields["trajectory_ids"] == i)
        places = sorted(zip(*np.nonzero(owned), strict=True), key=lambda p: (fields["turn_ids"][p], p))
        later = following = 0.0
        for n, place in enumerate(places[::-1]):
            reward = -0.3 * (score_fields["old_logprobs"][place] - score_fields["ref_logprobs"][place])
            reward += float(batch.returns[i]) if n == 0 else 0.0
            value = score_fields["values"][place]
            later = found[place] = reward + gamma * following - value + gamma * lam * later
            targets[place], following = later + value, value
    mask = fields["loss_mask"]
    np.testing.assert_allclose(credit.value_targets, targets, atol=1e-5)
    white = (found[mask] - found[mask].mean()) / np.sqrt(found[mask].var(ddof=1) + 1e-8)
    np.testing.assert_allclose(np.asarray(credit.advantages)[mask], white, atol=1e-4)
    left = (targets - score_fields["values"])[mask].var() / targets[mask].var()
    np.testing.assert_allclose(credit.metrics["explained_variance"], 1 - left, atol=1e-5)


@pytest.mark.slow
def test_the_critics_loss_is_clipped_weighed_and_masked():
    batch, scores, _, values = make_batch(junk=np.nan)
    algorithm = al.make_algorithm("ppo", critic={"value_coef": 0.25, "value_clip": 0.1})
    targets = algorithm.credit(batch, scores).value_targets

    def total(values):
        loss, metrics = algorithm.value_loss(values, batch, scores, targets)
        return jnp.sum(loss), metrics

    (_, metrics), gradient = jax.value_and_grad(total, has_aux=True)(values)
    mask = np.asarray(batch.loss_mask)
    old, new, goal = (np.asarray(x)[mask] for x in (scores.values, values, targets))
    near = np.clip(new, old - 0.1, old + 0.1)
    expected = np.maximum((new - goal) ** 2, (near - goal) ** 2) / 2
    np.testing.assert_allclose(np.asarray(metrics["value_loss"])[mask], expected, rtol=1e-5)
    active = (new - goal) ** 2 >= (near - goal) ** 2
    assert 0 < active.sum() < active.size
    np.testing.assert_allclose(np.asarray(gradient)[mask], 0.25 * (new - goal) * active, atol=1e-6)
    assert not np.asarray(gradient)[~mask].any()


def test_ppo_without_values_is_refused():
    batch, scores, *_ = make_batch()
    with pytest.raises(ValueError, match=r"has a critic: scores\.values must hold"):
        al.make_algorithm("ppo").credit(batch, scores.replace(values=None))


def test_penalties_come_before_the_estimator():
    batch, scores, *_ = make_batch()
    one = dataclasses.replace(batch, group_ids=jnp.zeros(N, jnp.int32))
    options = {"scale_by_std": False, "invalid_penalty": 0.5, "overlong_length": 4, "overlong_cache": 2}
    credit = al.make_algorithm("grpo", **options).credit(one, scores)
    lengths = np.array([1, 3, 4, 1, 3, 4])
    turns = np.arange(K)[None] < (1 + np.arange(6) % K)[:, None]
    invalid = (turns & ~np.asarray(batch.turn_valid)[:6]).sum(1)
    returns = (
        np.asarray(batch.returns)[:6] - 0.5 * invalid + np.maximum(-1, np.minimum(0, -(lengths - 2) / 2))
    )
    expected = (returns - returns.mean())[np.asarray(batch.trajectory_ids)] * np.asarray(batch.loss_mask)
    np.testing.assert_allclose(credit.advantages, expected, atol=1e-5)


def test_corrections_act_in_the_loss_and_before_the_weights():
    batch, scores, logprobs, entropies = make_batch()
    batch = dataclasses.replace(batch, minibatch_ids=jnp.minimum(batch.minibatch_ids, 0))
    plain = al.make_algorithm("grpo")
    credit = plain.credit(batch, scores)
    loss, _ = plain.loss(logprobs, entropies, batch, scores, credit.advantages)
    weights = al.tis_weights(scores.old_logprobs, batch.behavior_logprobs, batch.loss_mask, cap=1.1)
    tis = al.make_algorithm("grpo", correction={"kind": "tis", "cap": 1.1})
    corrected, _ = tis.loss(logprobs, entropies, batch, scores, credit.advantages)
    np.testing.assert_allclose(corrected, loss * weights, rtol=1e-6)

    mis = al.make_algorithm("grpo", correction={"kind": "mis", "low": 0.9, "high": 1.1}).credit(batch, scores)
    kept = al.mis_mask(scores.old_logprobs, batch.behavior_logprobs, batch.loss_mask, low=0.9, high=1.1)
    assert 0 < kept.sum() < batch.loss_mask.sum()
    np.testing.assert_allclose(mis.loss_weights, al.loss_weights(kept), rtol=1e-6)
    np.testing.assert_allclose(mis.metrics["correction_kept"], kept.sum() / batch.loss_mask.sum())

    for start, of in ((batch.behavior_logprobs, "sampler"), (scores.old_logprobs, "learner")):
        options = {"sequence_delta": -1.0} | ({"sequence_logprobs": of} if of == "learner" else {})
        dropped = al.make_algorithm("grpo", correction=options)
        masked, _ = dropped.loss(logprobs, entropies, batch, scores, credit.advantages)
        mask = al.offpolicy_sequence_mask(
            logprobs, start, credit.advantages, batch.loss_mask, batch.sequence_ids, delta=-1.0
        )
        assert mask.sum() < batch.loss_mask.sum()
        np.testing.assert_array_equal(masked, np.where(mask, loss, 0))


def test_kl_and_entropy_terms():
    batch, scores, logprobs, entropies = make_batch()
    plain = al.make_algorithm("grpo")
    advantages = plain.credit(batch, scores).advantages
    loss, _ = plain.loss(logprobs, entropies, batch, scores, advantages)
    full = al.make_algorithm("grpo", kl_coef=0.1, kl_kind="k2", entropy_coef=0.01)
    result, metrics = full.loss(logprobs, entropies, batch, scores, advantages)
    divergence = al.kl_penalty(logprobs, scores.ref_logprobs, kind="k2")
    np.testing.assert_allclose(result, loss + 0.1 * divergence - 0.01 * entropies, atol=1e-6)
    np.testing.assert_allclose(metrics["kl"], divergence)


def test_eight_devices_are_one():
    """Rows and trajectories sharded over eight devices: batch statistics must be global."""
    credit_of, loss_of = compiled("gspo_aem")
    batch, scores, logprobs, entropies = make_batch()
    expected = credit_of(batch, scores)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    spread = jax.device_put((batch, scores, logprobs, entropies), sharding)
    credit = credit_of(*spread[:2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), credit, expected)
    value, gradient = loss_of(spread[2], spread[3], spread[0], spread[1], credit)
    whole, whole_gradient = loss_of(logprobs, entropies, batch, scores, expected)
    np.testing.assert_allclose(value[0], whole[0], atol=1e-6)
    np.testing.assert_allclose(gradient, whole_gradient, atol=1e-6)


def test_vmap_over_batches():
    batches = [make_batch(seed)[:2] for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    credit, _ = compiled("gspo_aem")
    together = jax.vmap(credit)(*stacked)
    for i, (batch, scores) in enumerate(batches):
        alone = credit(batch, scores)
        np.testing.assert_allclose(together.advantages[i], alone.advantages, atol=1e-5)
        np.testing.assert_allclose(together.loss_weights[i], alone.loss_weights, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "grop"}, "algorithm name='grop'.*'grpo'"),
        ({"name": "grpo_empg", "modulation": "aem"}, "one modulation only: 'grpo_empg' means 'empg'"),
        ({"modulation": "both"}, "modulation='both'.*'none', 'empg', 'aem'"),
        ({"clip_hgih": 0.3}, "unknown option clip_hgih; did you mean 'clip_high'"),
        ({"empg": {"zeta_": 0.3}}, "unknown option empg.zeta_; did you mean 'zeta'"),
        ({"modulation": "aem", "aem": {"scope": "turn"}}, "aem.scope='turn'"),
        ({"loss": "ppo"}, "loss='ppo'.*'ppo_clip'"),
        ({"dual_clip": 0.5}, "dual_clip=0.5 must be above 1"),
        ({"num_minibatches": 0}, "num_minibatches=0 must be at least 1"),
        ({"loss": "decoupled_ppo", "correction": {"kind": "tis"}}, "already weighs"),
        ({"overlong_length": 5}, "set together"),
        ({"name": "reinforce_pp", "kl_coef": 0.1}, "not in both"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        al.make_algorithm(**arguments)


def test_group_size_one_falls_back_to_the_batch():
    with pytest.warns(UserWarning, match="group_size=1"):
        algorithm = al.make_algorithm("reinforce_aem", group_size=1)
    batch, scores, *_ = make_batch()
    expected = al.make_algorithm("reinforce_aem", aem={"scope": "batch"}).credit(batch, scores)
    np.testing.assert_array_equal(algorithm.credit(batch, scores).advantages, expected.advantages)


def test_a_new_algorithm_is_a_function_and_a_line(monkeypatch):
    def best_of_group(batch, scores, worth):
        """Only the best of a group gets credit."""
        best = al.has_spread(worth.returns, batch.group_ids) & (worth.returns == jnp.max(worth.returns))
        return jnp.broadcast_to(best.astype(jnp.float32)[:, None], worth.mask.shape)

    monkeypatch.setitem(al.ALGORITHMS, "best", al.Recipe(estimate=best_of_group))
    batch, scores, *_ = make_batch()
    batch = dataclasses.replace(batch, returns=batch.returns.at[6:].set(0))
    advantages = np.asarray(al.make_algorithm("best", modulation="aem").credit(batch, scores).advantages)
    winners = np.asarray(batch.trajectory_ids)[advantages > 0]
    assert set(winners) == {0}
