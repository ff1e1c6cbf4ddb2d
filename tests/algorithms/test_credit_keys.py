"""What the keys of an algorithm do to tokens and weights, over the episodes of `test_credit_path`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.algorithms.recipes import make_recipe
from empg_jax.config import load_config
from empg_jax.learner.batching import BatchShape, make_batch
from empg_jax.run.assembly import describe_algorithm, make_algorithm_from
from empg_jax.types import Scores
from tests.algorithms import oracles
from tests.algorithms.test_credit_path import (
    EPISODES,
    GROUPS,
    LIMIT,
    MASK,
    PENALTY,
    REWARDS,
    TURNS,
    VALID,
    run,
    tokens_of,
)
from tests.episodes import Episodes


@pytest.mark.parametrize("unit", ["turn", "trajectory"])
def test_truncated_and_void_turns_leave_the_loss(tmp_path, unit):
    whole = np.asarray(run(tmp_path, {"name": "grpo"})[2].loss_weights)
    for key, bad in (("mask_truncated", np.array([[4, 1]])), ("drop_void", np.argwhere(MASK & ~VALID))):
        batch, _, credit, _ = run(tmp_path, {"name": "grpo", key: unit})
        gone = np.zeros(MASK.shape, bool)
        gone[tuple(bad.T)] = True
        if unit == "trajectory":
            gone = np.repeat(gone.any(1, keepdims=True), TURNS, 1)
        tokens = batch.loss_mask.copy()
        tokens[batch.loss_mask] &= ~gone[batch.trajectory_ids, batch.turn_ids][batch.loss_mask]
        assert 0 < tokens.sum() < batch.loss_mask.sum() == (whole > 0).sum()
        np.testing.assert_allclose(credit.loss_weights, tokens / tokens.sum(), rtol=1e-5)


def test_episodes_that_a_limit_ended_leave_the_loss(tmp_path):
    """A response that the token limit cut ends no episode, so by itself it takes nothing away."""
    batch, scores, credit, config = run(tmp_path, {"name": "grpo", "mask_truncated": "limit"})
    ended = np.append([episode[4] != "" for episode in EPISODES], False)
    tokens = batch.loss_mask & ~ended[batch.trajectory_ids]
    np.testing.assert_allclose(credit.loss_weights, tokens / tokens.sum(), rtol=1e-5)
    whole = dataclasses.replace(batch, truncated=np.zeros_like(batch.truncated))
    weights = make_algorithm_from(config).credit(whole, scores).loss_weights
    assert batch.turn_truncated.any()
    np.testing.assert_allclose(weights, batch.loss_mask / batch.loss_mask.sum(), rtol=1e-5)


@pytest.mark.slow
def test_a_limit_is_bootstrapped_on_request(tmp_path):
    """What a turn limit ended goes on with the critic's last value; what broke a limit does not."""
    batch, scores, plain, _ = run(tmp_path, {"name": "ppo"})
    options = {"name": "ppo", "critic": "{bootstrap: true}"}
    longer = run(tmp_path, options)[2]
    change = np.asarray(longer.value_targets) - np.asarray(plain.value_targets)
    for i in range(len(EPISODES)):
        places = tokens_of(batch, i)
        expected = scores.values[places[-1]] if i == 4 else 0.0
        np.testing.assert_allclose([change[place] for place in places], expected, atol=1e-5)


@pytest.mark.parametrize("bootstrap", ["true", "false"])
def test_a_limit_is_bootstrapped_in_turns(tmp_path, bootstrap):
    """The worked numbers of Turn-PPO: one episode ended with reward 1, a limit cut the other at value 0.5."""
    episodes, path = Episodes(), tmp_path / "own.yaml"
    made = [
        episodes.trajectory(
            [episodes.turn(episodes.draw(2), 2, reward=reward) for reward in (0.0, 0.0, won)],
            group_id=0,
            member=int(1 - won),
            episode_return=won,
            truncated=not won,
        )
        for won in (1.0, 0.0)
    ]
    path.write_text(
        "rollout: {group_size: 2, tasks_per_update: 1}\ntrain: {num_minibatches: 1}\n"
        f"algorithm: {{name: turn_ppo, critic: {{bootstrap: {bootstrap}}}}}\n"
    )
    batch, _ = make_batch(made, BatchShape(2, 3, 32, 2, 6, 1), seed=(0,))
    values = np.full(batch.tokens.shape, 9.0, np.float32)  # junk where nothing is to be read
    for i in range(2):
        places = tokens_of(batch, i)
        for place, value in zip(places[::2], (0.2, 0.4, 0.7), strict=True):
            values[place] = value
        values[places[-1]] = 0.5
    scores = Scores(batch.behavior_logprobs, batch.behavior_entropies, batch.behavior_logprobs, values)
    credit = jax.jit(make_algorithm_from(load_config(path)).credit)(batch, scores)
    cut = [0.294317, 0.110345, -0.205] if bootstrap == "true" else [-0.098654, -0.3307, -0.7]
    np.testing.assert_allclose(credit.turns.base, [[0.695227, 0.560300, 0.3], cut], atol=2e-6)
    targets = [np.asarray(credit.value_targets)[place] for place in tokens_of(batch, 1)]
    np.testing.assert_allclose(targets, np.repeat(np.add(cut, [0.2, 0.4, 0.7]), 2), atol=2e-6)


def test_the_overlong_penalty_is_bounded_and_reaches_the_return(tmp_path):
    options = {"name": "dr_grpo", "overlong_length": 6, "overlong_cache": 2, "overlong_factor": 0.5}
    batch, _, credit, _ = run(tmp_path, options)
    lengths = np.array([len(tokens_of(batch, i)) for i in range(len(EPISODES))])
    total = REWARDS.sum(1) - PENALTY * (MASK & ~VALID).sum(1) - 0.5 * np.clip((lengths - 4) / 2, 0, 1)
    expected = oracles.group_advantages(np.where(LIMIT, np.minimum(total, 0), total), GROUPS, "mean")
    np.testing.assert_allclose(np.asarray(credit.turns.base)[:8, 0], expected, atol=1e-5)


@pytest.mark.parametrize("unit", ["segment", "trajectory", "turn"])
def test_a_sequence_is_what_the_unit_says(tmp_path, unit):
    """In window context a segment is a turn; in both, every unit weighs the same."""
    options = {"name": "grpo", "aggregation": "seq-mean-token-mean", "aggregation_unit": unit}
    batch, _, credit, _ = run(tmp_path, options, "window")
    weights = np.asarray(credit.loss_weights)
    for i in range(len(EPISODES)):
        mine = weights[batch.loss_mask & (batch.trajectory_ids == i)].sum()
        share = 1 / len(EPISODES) if unit == "trajectory" else MASK[i].sum() / MASK.sum()
        np.testing.assert_allclose(mine, share, rtol=1e-5)


def test_dr_grpo_divides_by_a_constant(tmp_path):
    batch, _, credit, _ = run(tmp_path, {"name": "dr_grpo"})
    np.testing.assert_allclose(np.asarray(credit.loss_weights)[batch.loss_mask], 1 / (8 * 32), rtol=1e-6)
    scaled = run(tmp_path, {"name": "dr_grpo", "loss_scale": 5.0})[2]
    np.testing.assert_allclose(np.asarray(scaled.loss_weights)[batch.loss_mask], 1 / (8 * 5), rtol=1e-6)


@pytest.mark.parametrize("kind", ["empg", "aem"])
def test_controls_keep_the_factors_and_lose_their_place(tmp_path, kind):
    plain = run(tmp_path, {"name": f"grpo_{kind}"})[2].turns
    shuffled = run(tmp_path, {"name": f"grpo_{kind}", kind: "{shuffle_seed: 3}"})[2].turns
    reverse = run(tmp_path, {"name": f"grpo_{kind}", kind: "{reverse: true}"})[2].turns
    for rows in (slice(0, 4), slice(4, 8)) if kind == "aem" else (slice(0, 8),):
        here, there = (np.asarray(t.factors)[rows][MASK[rows]] for t in (plain, shuffled))
        np.testing.assert_allclose(np.sort(here), np.sort(there), atol=1e-6)
        assert np.abs(here - there).max() > 0.1
    order = np.asarray(plain.factors)[:4][MASK[:4]], np.asarray(reverse.factors)[:4][MASK[:4]]
    assert np.corrcoef(*order)[0, 1] < -0.9
    config = run(tmp_path, {"name": f"grpo_{kind}", kind: "{shuffle_seed: 3}"})[3]
    assert describe_algorithm(config).endswith("shuffled); turn_penalty(amount=0.1)")


@pytest.mark.parametrize("dropped", [{}, {"mask_truncated": "turn"}], ids=["all", "some"])
def test_normalized_weights_have_mean_one_over_the_batch(tmp_path, dropped):
    """The mean is that of the batch's trained tokens, whatever rows the loss sees."""
    algorithm = {"name": "grpo"} | dropped
    plain = run(tmp_path, algorithm)[2]
    batch, scores, _, config = run(tmp_path, algorithm | {"correction": "{kind: tis, normalize: true}"})
    batch, scores = jax.tree.map(jnp.asarray, (batch, scores))
    trained = plain.loss_weights != 0
    assert np.array_equal(trained, batch.loss_mask) == (not dropped)
    old = scores.old_logprobs + 0.3 * trained.astype(jnp.float32)
    moved = dataclasses.replace(scores, old_logprobs=old)
    composed = make_algorithm_from(config)
    credit = composed.credit(batch, moved)
    np.testing.assert_allclose(credit.advantages * np.exp(0.3), plain.advantages, rtol=1e-4, atol=1e-6)
    rows = batch.replace(loss_mask=trained)  # as the learner gives them
    loss, _ = composed.loss(moved.old_logprobs, moved.entropies, rows, moved, credit.advantages)
    np.testing.assert_allclose(loss, np.where(trained, -plain.advantages, 0), rtol=1e-4, atol=1e-6)


def test_a_baseline_of_the_whole_return_counts_at_the_end(tmp_path):
    """An episode's later turns do not pay for what its first turn already got."""
    _, _, credit, _ = run(tmp_path, {"name": "reinforce_pp_baseline"}, penalty=0.0)
    for table in np.asarray(credit.turns.base)[: len(EPISODES)]:
        found = table[table != 0]
        np.testing.assert_allclose(found, found[0], rtol=1e-4)  # gamma 1: the same for every turn


def test_the_divergence_is_corrected_for_the_policy_that_sampled(tmp_path):
    """`k3_is` over samples of an older policy is the KL of the policy being trained, gradient too."""
    sampler, policy, reference = (np.float32(x) for x in ([0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.4, 0.4, 0.2]))
    penalty = make_recipe("grpo", {"kl_coef": 1.0, "kl_kind": "k3_is"}).kl
    rows = dataclasses.replace(run(tmp_path, {"name": "grpo"})[0], behavior_logprobs=np.log(sampler)[None])
    before = np.log(policy)[None]  # the first step: the learner before the update is the policy itself
    scores = Scores(old_logprobs=before, entropies=before, ref_logprobs=np.log(reference)[None])

    def divergence(logits):
        found, weight = penalty(jax.nn.log_softmax(logits)[None], rows, scores)
        return jnp.sum(sampler * found[0]) * weight

    def exact(logits):
        logprobs = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logprobs) * (logprobs - np.log(reference)))

    logits = jnp.log(policy)
    np.testing.assert_allclose(divergence(logits), exact(logits), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(divergence)(logits), jax.grad(exact)(logits), atol=1e-5)
