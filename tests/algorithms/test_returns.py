"""Functions along time: a backward loop as oracle, observations skipped, rows independent."""

import functools

import jax
import numpy as np
import pytest

from empg_jax import algorithms as al
from empg_jax.algorithms.timeline import token_reward_to_go

from . import oracles

S, L = 4, 9


@pytest.fixture
def rows():
    rng = np.random.default_rng(5)
    mask = rng.random((S, L)) < 0.6
    mask[0], mask[1] = True, False
    rewards, values = rng.normal(size=(2, S, L)).astype(np.float32)
    return np.where(mask, rewards, np.nan), np.where(mask, values, np.inf), mask


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8), (0.95, 0.0)])
@pytest.mark.parametrize("compiled", [False, True])
def test_gae_equals_a_loop(rows, gamma, lam, compiled):
    rewards, values, mask = rows
    function = functools.partial(al.gae, gamma=gamma, lam=lam)
    advantages, returns = (jax.jit(function) if compiled else function)(rewards, values, mask)
    expected = oracles.gae(rewards, values, mask, gamma, lam)
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(mask, expected + np.where(mask, values, 0), 0), atol=1e-5)


def test_discounted_returns_skip_observations():
    rewards = np.float32([[0, 9, 0, 9, 9, 1, 9]])
    mask = np.array([[1, 0, 1, 0, 0, 1, 0]])
    result = al.discounted_returns(rewards, mask, gamma=0.5)
    np.testing.assert_allclose(result, [[0.25, 0, 0.5, 0, 0, 1, 0]])


def test_masked_equals_sliced(rows):
    rewards, values, mask = rows
    kept = np.flatnonzero(mask[2])
    whole, _ = al.gae(rewards, values, mask, gamma=0.9, lam=0.7)
    alone, _ = al.gae(rewards[2:3, kept], values[2:3, kept], np.ones((1, len(kept))), gamma=0.9, lam=0.7)
    np.testing.assert_allclose(whole[2, kept], alone[0], atol=1e-6)


def test_whiten(rows):
    rewards, _, mask = rows
    result = np.asarray(al.whiten(rewards, mask))
    np.testing.assert_allclose(result[mask].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(result[mask].var(ddof=1), 1, atol=1e-5)
    assert not result[~mask].any()
    np.testing.assert_array_equal(al.whiten(np.full((S, L), 0.1, np.float32), mask), np.zeros((S, L)))


def test_reinforce_pp_is_whitened_reward_to_go(rows):
    rewards, _, mask = rows
    expected = al.whiten(al.discounted_returns(rewards, mask, gamma=0.9), mask)
    np.testing.assert_allclose(al.reinforce_pp(rewards, mask, gamma=0.9), expected, atol=1e-6)


def test_reward_to_go_follows_the_trajectory_through_packed_rows():
    """Trajectory 0 continues from row 0 into row 1, past the packed neighbor 1."""
    slots = np.int32([[0, -1, 0, 3, 3, -1], [1, 1, -1, 2, 4, -1]])  # K = 3
    rewards = np.float32([[1, 9, 2, 100, 200, 9], [4, 8, 9, 16, 400, 9]])
    result = jax.jit(functools.partial(token_reward_to_go, num_turns=3, gamma=0.5))(rewards, slots)
    first = [1 + 0.5 * (2 + 0.5 * (4 + 0.5 * (8 + 0.5 * 16))), 2 + 0.5 * (4 + 0.5 * (8 + 0.5 * 16))]
    expected = [
        [first[0], 0, first[1], 100 + 0.5 * (200 + 0.5 * 400), 200 + 0.5 * 400, 0],
        [4 + 0.5 * (8 + 0.5 * 16), 8 + 0.5 * 16, 0, 16, 400, 0],
    ]
    np.testing.assert_allclose(result, expected)
