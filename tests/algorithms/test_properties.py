"""Properties that hold for any data: agreement with plain loops, invariances, exact off-switches.

Shapes are fixed, so that each function compiles once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from empg_jax import algorithms as al

from . import oracles

N, K = 8, 5
quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**31 - 1)


def jitted(function, **static):
    return jax.jit(functools.partial(function, **static))


def draw(seed):
    """A random batch: some trajectories absent, some turns empty (also inside), junk under every mask."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, rng.integers(1, N + 1), N).astype(np.int32)
    groups[rng.random(N) < 0.2] = -1
    mask = rng.random((N, K)) < rng.choice([0.3, 0.8, 1.0])
    entropies = rng.gamma(2.0, 0.4, (N, K)).astype(np.float32)
    base = rng.normal(size=(N, K)).astype(np.float32)
    absent = ~mask | (groups < 0)[:, None]
    entropies[absent], base[absent] = rng.choice([np.nan, np.inf, -1e9], 2)
    returns = rng.choice(np.float32([0, 0.1, 1.0, 10.0]), N)
    returns[groups < 0] = np.nan
    return returns, groups, base, entropies, mask


EMPG = {
    scope: jitted(lambda a, h, m, g, scope=scope: al.empg(a, h, m, group_ids=g, scope=scope))
    for scope in ("batch", "group", "trajectory")
}
AEM = {
    scope: jitted(lambda a, h, m, g, scope=scope: al.aem(a, h, m, group_ids=g, scope=scope))
    for scope in ("batch", "group", "trajectory")
}
BASE = {
    "std": jitted(al.grpo),
    "mean": jitted(al.grpo, scale_by_std=False),
    "rloo": jitted(al.rloo),
}


def segments_of(scope, groups, fallback=False):
    present = groups >= 0
    alone = np.bincount(groups[present], minlength=1).max(initial=0) == 1 and present.sum() > 1
    if scope == "batch" or (fallback and scope == "group" and alone):
        return np.where(present, 0, -1)
    return groups if scope == "group" else np.where(present, np.arange(N), -1)


@pytest.mark.parametrize("scope", EMPG)
@quick
@given(seed=seeds)
def test_empg_equals_a_loop(scope, seed):
    _, groups, base, entropies, mask = draw(seed)
    segments = segments_of(scope, groups)
    expected = oracles.modulation(base, entropies, mask, segments, k=1.0, zeta=0.1, center=True)
    np.testing.assert_allclose(EMPG[scope](base, entropies, mask, groups), expected, atol=2e-5)


@pytest.mark.parametrize("scope", AEM)
@quick
@given(seed=seeds)
def test_aem_equals_a_loop(scope, seed):
    _, groups, base, entropies, mask = draw(seed)
    segments = segments_of(scope, groups, fallback=True)
    expected = oracles.modulation(base, entropies, mask, segments, k=1.0, min_range=0.1)
    result = AEM[scope](base, entropies, mask, groups)
    np.testing.assert_allclose(result, expected, atol=2e-5)
    valid = mask & (groups >= 0)[:, None]
    np.testing.assert_array_equal(np.sign(result)[valid], np.sign(base)[valid])


@pytest.mark.parametrize("kind", BASE)
@quick
@given(seed=seeds)
def test_group_advantages_equal_a_loop(kind, seed):
    returns, groups, *_ = draw(seed)
    result = BASE[kind](returns, groups)
    expected = oracles.group_advantages(np.nan_to_num(returns), groups, kind)
    np.testing.assert_allclose(result, expected, atol=1e-4)


UNITS = np.ones((N, K), np.float32)
FACTORS = {
    "empg": jitted(lambda h, m, g: al.empg(UNITS, h, m, group_ids=g, zeta=0.0, center="none")),
    "aem": jitted(lambda h, m, g: al.aem(UNITS, h, m, group_ids=g)),
    "token": jitted(lambda h, m, g, c: al.aem(UNITS, h, m, group_ids=g, mean="token", token_counts=c)),
}


@quick
@given(seed=seeds)
def test_factors_have_mean_one_in_their_scope(seed):
    _, groups, _, entropies, mask = draw(seed)
    counts = np.random.default_rng(seed).integers(1, 9, (N, K)).astype(np.int32)
    valid = mask & (groups >= 0)[:, None]
    if not valid.any():
        return
    g = np.asarray(FACTORS["empg"](entropies, mask, groups))
    np.testing.assert_allclose(g[valid].mean(), 1, atol=1e-5)
    assert g[valid].min() > np.exp(-1.001) and g[valid].max() < np.exp(1.001)
    for segments, alpha, weights in (
        (segments_of("group", groups, True), FACTORS["aem"](entropies, mask, groups), np.ones((N, K))),
        (segments_of("group", groups, True), FACTORS["token"](entropies, mask, groups, counts), counts),
    ):
        for segment in set(segments[segments >= 0]):
            members = valid & (segments == segment)[:, None]
            if members.any():
                mean = np.average(np.asarray(alpha)[members], weights=weights[members])
                np.testing.assert_allclose(mean, 1, atol=1e-5)


@quick
@given(seed=seeds)
def test_permuting_trajectories_and_renaming_groups_changes_nothing(seed):
    returns, groups, base, entropies, mask = draw(seed)
    rng = np.random.default_rng(seed)
    order, names = rng.permutation(N), rng.permutation(N).astype(np.int32)
    renamed = np.where(groups >= 0, names[groups], -1)
    for function in BASE.values():
        moved = function(returns[order], renamed[order])
        np.testing.assert_allclose(moved, function(returns, groups)[order], atol=1e-5)
    for function in (*EMPG.values(), *AEM.values()):
        moved = function(base[order], entropies[order], mask[order], renamed[order])
        np.testing.assert_allclose(moved, function(base, entropies, mask, groups)[order], atol=1e-5)


PADDED = {
    "empg": jitted(lambda a, h, m, g: al.empg(a, h, m, group_ids=g)),
    "aem": jitted(lambda a, h, m, g: al.aem(a, h, m, group_ids=g)),
}


@quick
@given(seed=seeds)
def test_more_padding_changes_nothing(seed):
    returns, groups, base, entropies, mask = draw(seed)
    rows, turns = ((0, 3), (0, 0)), ((0, 3), (0, 2))
    more_groups = np.pad(groups, rows[0], constant_values=-1)
    more_returns = np.pad(returns, rows[0], constant_values=np.inf)
    for function in BASE.values():
        np.testing.assert_allclose(
            function(more_returns, more_groups)[:N], function(returns, groups), atol=1e-6
        )
    wide = [np.pad(base, turns, constant_values=np.nan), np.pad(entropies, turns, constant_values=np.inf)]
    for name, function in PADDED.items():
        result = np.asarray(function(*wide, np.pad(mask, turns), more_groups))
        narrow = {"empg": EMPG["batch"], "aem": AEM["group"]}[name](base, entropies, mask, groups)
        np.testing.assert_allclose(result[:N, :K], narrow, atol=1e-6)
        assert not result[N:].any() and not result[:, K:].any()


@quick
@given(seed=seeds, shift=st.floats(-50, 50, width=32), scale=st.sampled_from([0.25, 2.0, 32.0]))
def test_shift_and_scale_of_the_returns(seed, shift, scale):
    _, groups, *_ = draw(seed)
    returns = np.random.default_rng(seed).normal(size=N).astype(np.float32)
    for kind, function in BASE.items():
        plain = np.asarray(function(returns, groups))
        np.testing.assert_allclose(function(returns + np.float32(shift), groups), plain, atol=2e-3)
        scaled = function(returns * np.float32(scale), groups)
        np.testing.assert_allclose(scaled, plain if kind == "std" else plain * scale, atol=1e-3)


@quick
@given(seed=seeds, value=st.floats(-100, 100, width=32))
def test_groups_without_variance_get_exactly_zero(seed, value):
    _, groups, _, entropies, mask = draw(seed)
    for function in BASE.values():
        advantages = function(np.full(N, value, np.float32), groups)
        np.testing.assert_array_equal(advantages, np.zeros(N))
    zeros = np.zeros((N, K), np.float32)
    np.testing.assert_array_equal(AEM["group"](zeros, entropies, mask, groups), zeros)


OFF = {
    "empg": jitted(lambda a, h, m, g: al.empg(a, h, m, group_ids=g, k=0, zeta=0, center="none")),
    "aem": jitted(lambda a, h, m, g: al.aem(a, h, m, group_ids=g, lam=0)),
}


@pytest.mark.parametrize("name", OFF)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@quick
@given(seed=seeds)
def test_switched_off_is_the_base_exactly(name, dtype, seed):
    _, groups, base, entropies, mask = draw(seed)
    with jax.enable_x64(dtype == np.float64):
        result = OFF[name](base.astype(dtype), entropies.astype(dtype), mask, groups)
        assert result.dtype == dtype
        kept = mask & (groups >= 0)[:, None]
        np.testing.assert_array_equal(result, np.where(kept, base, 0))


@quick
@given(seed=seeds, level=st.floats(0, 9, width=32))
def test_equal_entropies_leave_the_factor_at_one(seed, level):
    _, groups, base, _, mask = draw(seed)
    valid = mask & (groups >= 0)[:, None]
    entropies = np.full((N, K), level, np.float32)
    np.testing.assert_allclose(FACTORS["empg"](entropies, mask, groups), valid, atol=1e-6)
    np.testing.assert_array_equal(AEM["trajectory"](base, entropies, mask, groups), np.where(valid, base, 0))


@quick
@given(seed=seeds)
def test_one_turn_trajectories_have_no_bonus(seed):
    _, groups, base, entropies, _ = draw(seed)
    mask = np.zeros((N, K), bool)
    mask[:, 2] = True
    entropies, base = np.nan_to_num(entropies, posinf=1, neginf=0), np.nan_to_num(base, posinf=1, neginf=0)
    with_bonus = PLAIN_BONUS(base, entropies, mask, groups, 0.7)
    np.testing.assert_array_equal(with_bonus, PLAIN_BONUS(base, entropies, mask, groups, 0.0))


PLAIN_BONUS = jax.jit(lambda a, h, m, g, zeta: al.empg(a, h, m, group_ids=g, zeta=zeta, center="none"))


@quick
@given(seed=seeds)
def test_empg_with_one_group_is_aem(seed):
    """Without bonus and centring, and beyond the dead zone, both are one kernel."""
    _, groups, base, entropies, mask = draw(seed)
    one = np.where(groups >= 0, 0, -1).astype(np.int32)
    spread = np.where(mask, entropies, 0.5)
    spread[:, 0], mask[:, 0], base = np.linspace(0.1, 2, N), True, np.nan_to_num(base, posinf=1, neginf=1)
    result = AEM["group"](base, spread, mask, one)
    np.testing.assert_allclose(PLAIN_BONUS(base, spread, mask, one, 0.0), result, rtol=1e-5, atol=1e-6)


GIGPO = jitted(al.gigpo)


@quick
@given(seed=seeds)
def test_gigpo_equals_a_loop(seed):
    returns, groups, _, _, mask = draw(seed)
    rng = np.random.default_rng(seed)
    anchors = rng.choice(np.int32([-1, 0, 5, 2**31 - 1]), (N, K))
    turn_returns = rng.normal(size=(N, K)).astype(np.float32)
    expected = oracles.anchor_advantages(turn_returns, anchors, mask, groups)
    expected += oracles.group_advantages(np.nan_to_num(returns), groups, "mean")[:, None]
    expected *= mask & (groups >= 0)[:, None]
    junk = np.where(mask, turn_returns, np.nan)
    np.testing.assert_allclose(GIGPO(returns, junk, anchors, mask, groups), expected, atol=1e-5)


MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
WEIGHTS = {
    mode: jax.jit(lambda m, ids, mode=mode: al.loss_weights(m, mode=mode, sequence_ids=ids)) for mode in MODES
}


@pytest.mark.parametrize("mode", MODES)
@quick
@given(seed=seeds)
def test_loss_weights_equal_a_count(mode, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((4, 9)) < rng.choice([0.0, 0.5, 0.9])
    ids = rng.choice(np.int32([-1, 3, 1000, 2**31 - 1, 7]), (4, 9))
    np.testing.assert_allclose(WEIGHTS[mode](mask, ids), oracles.weights(mask, mode, ids), atol=1e-6)


SHUFFLED = jax.jit(lambda a, h, m, g, key: al.aem(a, h, m, group_ids=g, shuffle_key=key))


@quick
@given(seed=seeds)
def test_shuffled_control_keeps_each_groups_factors(seed):
    _, groups, _, entropies, mask = draw(seed)
    plain = np.asarray(SHUFFLED_UNITS(entropies, mask, groups))
    moved = np.asarray(SHUFFLED(UNITS, entropies, mask, groups, jax.random.key(seed)))
    segments = segments_of("group", groups, True)
    for segment in set(segments[segments >= 0]):
        members = mask & (segments == segment)[:, None]
        np.testing.assert_allclose(np.sort(moved[members]), np.sort(plain[members]), atol=1e-6)
    assert not moved[~mask | (groups < 0)[:, None]].any()


SHUFFLED_UNITS = FACTORS["aem"]


def test_shuffled_control_shuffles():
    entropies = np.linspace(0, 2, N * K, dtype=np.float32).reshape(N, K)
    mask, groups = np.ones((N, K), bool), np.repeat(np.arange(2, dtype=np.int32), N // 2)
    moved = SHUFFLED(UNITS, entropies, mask, groups, jax.random.key(0))
    plain = SHUFFLED_UNITS(entropies, mask, groups)
    assert np.mean(np.abs(np.asarray(moved) - np.asarray(plain)) > 1e-3) > 0.5


def test_gradients_are_stopped_and_finite():
    _, groups, base, entropies, mask = draw(3)

    def total(advantages, entropies):
        return jnp.sum(
            al.empg(advantages, entropies, mask) + al.aem(advantages, entropies, mask, group_ids=groups)
        )

    for gradient in jax.grad(total, (0, 1))(base, entropies):
        np.testing.assert_array_equal(gradient, np.zeros((N, K)))
