"""What acts in the loss alone, from a file to values and gradients: SAMPO's filter, entropies, the KL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.algorithms import Recipe, parts
from empg_jax.algorithms.contract import TokenCredit
from empg_jax.algorithms.trial import try_recipe
from empg_jax.errors import ConfigError
from empg_jax.run.assembly import make_algorithm_from
from empg_jax.types import Scores

from . import step_oracles
from .test_credit_path import PENALTY, run, step_data, tokens_of


def test_uniform_groups_leave_sampos_loss_and_nothing_else(tmp_path):
    """The second group differs in raw returns, as the first does: with `drop_uniform` all stay."""
    plain = run(tmp_path, {"name": "gigpo"})[2]
    batch, _, credit, config = run(tmp_path, {"name": "sampo"})
    np.testing.assert_allclose(credit.turns.advantages, plain.turns.advantages, atol=1e-6)
    np.testing.assert_allclose(credit.loss_weights, plain.loss_weights)
    same = batch.replace(returns=np.where(batch.group_ids == 1, np.float32(0.5), batch.returns))
    scores = Scores(batch.behavior_logprobs, batch.behavior_entropies, batch.behavior_logprobs)
    weights = np.asarray(make_algorithm_from(config).credit(same, scores).loss_weights)
    first = batch.loss_mask & (np.asarray(batch.group_ids)[batch.trajectory_ids] == 0)
    np.testing.assert_allclose(weights, first / first.sum(), rtol=1e-5)


@pytest.mark.parametrize("key", ["drop_void: turn", "mask_truncated: trajectory", "drop_uniform: group"])
def test_the_share_of_tokens_that_the_loss_covers(tmp_path, key):
    name, value = key.split(": ")
    batch, scores, _, config = run(tmp_path, {"name": "grpo", name: value})
    if name == "drop_uniform":
        batch = batch.replace(returns=np.where(batch.group_ids == 1, np.float32(0.5), batch.returns))
    credit = make_algorithm_from(config).credit(batch, scores)
    covered = (np.asarray(credit.loss_weights) != 0).sum() / batch.loss_mask.sum()
    np.testing.assert_allclose(credit.metrics["loss_coverage"], covered, rtol=1e-6)
    assert covered < 1 and credit.metrics["correction_kept"] == 1


def test_numbers_of_credit_are_of_what_the_loss_covers(tmp_path):
    """SAMPO pays the steps of uniform groups, which its loss leaves out; EMPG may leave them out itself."""
    batch, scores, _, config = run(tmp_path, {"name": "sampo"})
    batch = batch.replace(returns=np.where(batch.group_ids == 1, np.float32(0.5), batch.returns))
    credit = make_algorithm_from(config).credit(batch, scores)
    covered = np.asarray(credit.loss_weights) != 0
    is_first = (np.asarray(batch.group_ids) == 0)[:, None]
    paid = np.asarray(credit.turns.advantages)
    assert np.abs(paid[np.asarray(credit.turns.mask) & ~is_first]).max() > 0
    ours = paid[np.asarray(credit.turns.mask) & is_first]
    for name, value in {
        "mean": ours.mean(),
        "abs_mean": np.abs(ours).mean(),
        "positive": (ours > 0).mean(),
    }.items():
        np.testing.assert_allclose(credit.metrics[f"advantage_{name}"], value, rtol=1e-5, atol=1e-7)
    drift = credit.advantages * (-scores.old_logprobs - scores.entropies)
    expected = np.asarray(drift)[covered].sum() / batch.loss_mask.sum()
    np.testing.assert_allclose(credit.metrics["entropy_drift_predicted"], expected, rtol=1e-4)

    options = {"name": "grpo_empg", "empg": {"mixed_groups_only": True}}
    metrics = make_algorithm_from(run(tmp_path, options)[3]).credit(batch, scores).metrics
    np.testing.assert_allclose(metrics["modulation_mean"], 1, rtol=1e-5)
    assert metrics["modulation_min"] > 0


@pytest.mark.parametrize(("change", "is_clipped"), [(0.5, True), (-0.5, True), (0.0, False)])
def test_cispo_clips_weights_whatever_the_sign_of_the_advantage(tmp_path, change, is_clipped):
    options = {"name": "grpo", "loss": "cispo", "clip_low": 0.2, "clip_high": 0.2}
    batch, scores, credit, config = run(tmp_path, options)
    mask = np.asarray(batch.loss_mask)
    assert len(set(np.sign(np.asarray(credit.advantages)[mask]))) > 1
    batch, scores = jax.tree.map(jnp.asarray, (batch, scores))
    streams = (scores.old_logprobs + jnp.float32(change), scores.entropies, batch, scores, credit.advantages)
    found = np.asarray(make_algorithm_from(config).loss(*streams)[1]["clip_fraction"])
    np.testing.assert_array_equal(found[mask] > 0, is_clipped)


@pytest.mark.parametrize(
    ("bound", "halved", "doubled"), [({"entropy_low": 0.8}, 0, 1), ({"entropy_high": 1.3}, 1, 0)]
)
def test_one_bound_of_the_entropy_ratio_leaves_the_other_side_open(tmp_path, bound, halved, doubled):
    options = {"name": "grpo", "entropy_source": "learner", "correction": bound}
    batch, scores, credit, config = run(tmp_path, options)
    batch, scores = jax.tree.map(jnp.asarray, (batch, scores))
    algorithm, mask = make_algorithm_from(config), np.asarray(batch.loss_mask)
    for factor, kept in ((0.5, halved), (1.0, 1), (2.0, doubled)):
        streams = (scores.old_logprobs, factor * scores.entropies, batch, scores, credit.advantages)
        np.testing.assert_array_equal(np.asarray(algorithm.loss(*streams)[1]["entropy_kept"])[mask], kept)


def test_entropy_ratio_clipping_removes_gradients_only(tmp_path):
    """Where entropies doubled the loss keeps its value without a gradient; the others keep both."""
    batch, scores, credit, config = run(tmp_path, {"name": "erc", "entropy_source": "learner"})
    batch, scores = jax.tree.map(jnp.asarray, (batch, scores))
    algorithm = make_algorithm_from(config)
    moved = jnp.asarray(np.arange(batch.tokens.shape[0]) % 2 == 0)[:, None]
    entropies = jnp.where(moved, 2.0, 1.0) * scores.entropies

    def total(logprobs, entropies):
        loss, metrics = algorithm.loss(logprobs, entropies, batch, scores, credit.advantages)
        return jnp.sum(loss), (loss, metrics)

    (_, (loss, metrics)), gradient = jax.value_and_grad(total, has_aux=True)(scores.old_logprobs, entropies)
    mask = np.asarray(batch.loss_mask)
    np.testing.assert_allclose(np.asarray(loss)[mask], -np.asarray(credit.advantages)[mask], rtol=1e-5)
    kept = mask & ~np.asarray(moved)
    np.testing.assert_array_equal(np.asarray(metrics["entropy_kept"])[mask], kept[mask])
    np.testing.assert_allclose(gradient, np.where(kept, -np.asarray(credit.advantages), 0), atol=1e-6)


def test_the_kl_of_older_samples_from_a_file(tmp_path):
    options = {"name": "grpo", "kl_coef": 0.5, "kl_kind": "k3_is"}
    batch, scores, credit, config = run(tmp_path, options)
    batch, scores = jax.tree.map(jnp.asarray, (batch, scores))
    new = scores.old_logprobs - 0.25 * batch.loss_mask.astype(jnp.float32)
    plain = make_algorithm_from(run(tmp_path, {"name": "grpo"})[3])
    streams = (new, scores.entropies, batch, scores, credit.advantages)
    change = make_algorithm_from(config).loss(*streams)[0] - plain.loss(*streams)[0]
    mask = np.asarray(batch.loss_mask)
    back = np.asarray(scores.ref_logprobs - new)
    expected = 0.5 * np.exp(-0.25) * np.clip(np.exp(back) - back - 1, None, 10)
    np.testing.assert_allclose(np.asarray(change)[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_a2tgpos_gains_move_the_clip_ranges(tmp_path):
    """Half of the turns became likelier, half less likely: the gradient, and what is clipped."""
    options = {"name": "a2tgpo", "clip_low": 0.1, "clip_high": 0.2}
    batch, scores, credit, config = run(tmp_path, options)
    gains = step_oracles.a2tgpo_gains(step_data(PENALTY))
    ranges = 1 + 0.3 * (2 / (1 + np.exp(-np.nan_to_num(gains))) - 1)
    expected = np.zeros(batch.tokens.shape)
    for i in range(len(ranges)):
        for place in tokens_of(batch, i):
            expected[place] = ranges[i, batch.turn_ids[place]]
    np.testing.assert_allclose(credit.clip_scale, expected, atol=1e-5)
    assert np.ptp(expected[batch.loss_mask]) > 0.1

    batch, scores = jax.tree.map(jnp.asarray, (batch, scores))
    # e^0.13 = 1.139 is outside of some ranges, inside of others.
    change = jnp.where(batch.turn_ids % 2 == 1, jnp.float32(0.13), jnp.float32(-0.13))
    rows = scores.replace(clip_scale=credit.clip_scale)
    algorithm = make_algorithm_from(config)

    def total(logprobs):
        loss, metrics = algorithm.loss(logprobs, scores.entropies, batch, rows, credit.advantages)
        return jnp.sum(loss), metrics

    gradient, metrics = jax.grad(total, has_aux=True)(scores.old_logprobs + change)
    ratio, paid = np.exp(np.asarray(change)), np.asarray(credit.advantages)
    clipped = (paid > 0) & (ratio > 1 + 0.2 * expected) | (paid < 0) & (ratio < 1 - 0.1 * expected)
    clipped &= np.asarray(batch.loss_mask)
    assert 0 < clipped.sum() < np.asarray(batch.loss_mask).sum()
    np.testing.assert_array_equal(np.asarray(metrics["clip_fraction"]) > 0, clipped)
    wanted = np.where(np.asarray(batch.loss_mask) & ~clipped, -paid * ratio, 0)
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)


@pytest.mark.slow
def test_clip_ranges_need_an_objective_that_clips(tmp_path):
    """Refused when the configuration is read; an estimator of one's own, when it is tried."""
    with pytest.raises(
        ConfigError, match=r"name=a2tgpo gives every turn a clip range, and algorithm.loss=sapo"
    ):
        run(tmp_path, {"name": "a2tgpo", "loss": "sapo"})
    with pytest.raises(ValueError, match="a2tgpo gives every turn a clip range, and sapo clips no ratio"):
        Recipe(estimate=parts.a2tgpo(), objective=parts.sapo())

    def own(shape):
        def estimate(batch, scores, worth):
            scale = jnp.ones(batch.tokens.shape if shape is None else shape, jnp.float32)
            return TokenCredit(scores.old_logprobs, clip_scale=scale)

        return estimate

    try_recipe(Recipe(estimate=own(None)), "own")
    with pytest.raises(ValueError, match=r"own: .*estimate gives every turn a clip range, and sapo clips"):
        try_recipe(Recipe(estimate=own(None), objective=parts.sapo()), "own")
    with pytest.raises(
        ValueError, match=r"estimate returned shape \(4, 1\); expected float\[B, T\] as clip_scale"
    ):
        try_recipe(Recipe(estimate=own((4, 1))), "own")
