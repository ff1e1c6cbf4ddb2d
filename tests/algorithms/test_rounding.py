"""Rounding is not credit: sums of the same rewards in another order count as equal, everywhere alike."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import empg_jax.algorithms as al
from empg_jax.algorithms.segments import center_by_group
from empg_jax.rollout.ledger import is_uniform

N, K = 128, 50


def winners(dtype):
    """Episodes that all end well after a different number of turns: no turn is better than another."""
    mask = np.arange(K)[None] < np.random.default_rng(0).integers(10, K + 1, N)[:, None]
    rewards = np.zeros((N, K), dtype)
    rewards[np.arange(N), mask.sum(1) - 1] = 10
    returns = al.discounted_returns(jnp.asarray(rewards), mask, gamma=0.95)
    left = mask.sum(1)[:, None] - np.arange(K)  # the observation tells the turns that are left
    anchors = np.where(mask, left, -1).astype(np.int32)
    return jnp.asarray(rewards.sum(1)), returns, anchors, mask, np.zeros(N, np.int32)


@pytest.mark.slow
def test_a_spread_of_rounding_alone_is_no_credit():
    total, returns, anchors, mask, groups = winners(np.float32)
    spread = [np.ptp(np.asarray(returns)[anchors == left]) for left in range(1, K + 1)]
    assert max(spread) > 0  # the sums do round apart
    found = jax.jit(partial(al.gigpo, scale_by_std=True))(total, returns, anchors, mask, groups)
    np.testing.assert_array_equal(found, 0)
    found = jax.jit(partial(al.hgpo, scale_by_std=True))(returns, anchors, mask, groups)
    np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("offset", [0.0, 1.0, -10.0, 1000.0])
@pytest.mark.parametrize("ulps", [1, 8, 40, 1000])
def test_ledger_and_credit_agree_on_what_is_equal(offset, ulps):
    step = ulps * np.spacing(np.float32(max(abs(offset), 1)))
    returns = np.float32([offset, offset + step])
    mixed = bool(al.has_spread(returns, np.zeros(2, np.int32)).any())
    assert mixed == (ulps > 16)

    class Attempt:
        def __init__(self, value):
            self.episode_return = float(value)

    assert is_uniform([Attempt(value) for value in returns]) != mixed
    deviations, std, _ = center_by_group(jnp.asarray(returns), jnp.zeros(2, jnp.int32), 1)
    assert bool(jnp.any(deviations != 0)) == mixed and bool(jnp.any(std != 0)) == mixed


def test_equal_entropies_of_turns_of_different_length_are_equal():
    """Their means round apart; both kernels leave them alone all the same."""
    lengths = (3, 7, 11, 13)
    owners = np.repeat(np.arange(4), lengths)[None]
    entropies, mask = al.compute_turn_entropies(
        np.full(owners.shape, 0.7, np.float32),
        np.ones(owners.shape, bool),
        (owners // 2).astype(np.int32),
        (owners % 2).astype(np.int32),
        num_trajectories=2,
        num_turns=2,
    )
    assert np.ptp(np.asarray(entropies)) > 0  # they do round apart
    base, groups = jnp.float32([[1, 1], [-1, -1]]), np.zeros(2, np.int32)
    found = al.empg(base, entropies, mask, k=1.0, k_future=1.0, zeta=0.0, center="none")
    np.testing.assert_allclose(found, base, rtol=1e-6)
    found = al.aem(base, entropies, mask, group_ids=groups, min_range=0.0)
    np.testing.assert_allclose(found, base, rtol=1e-6)
