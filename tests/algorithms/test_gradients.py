"""Gradients of every objective against central differences in float64.

Where an objective treats part of itself as a constant, the difference quotient is that of the function it
stands for: the sequence objective for GSPO, frozen weights for CISPO, k2 for the corrected KL estimators.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax import algorithms as al

B, T = 3, 6


def data(seed=0):
    """Streams that stay clear of the kinks of clip and max by far more than the difference step."""
    rng = np.random.default_rng(seed)
    logprobs = -rng.gamma(2.0, 0.4, (B, T))
    old = logprobs + rng.normal(scale=0.4, size=(B, T))
    behavior = old + rng.normal(scale=0.5, size=(B, T))
    advantages = rng.normal(size=(B, T))
    return logprobs, old, behavior, advantages


IDS = np.array([[0, 0, 0, 1, 1, -1], [2, 2, 2, 2, 2, 2], [5, -1, 5, 6, 6, 6]], np.int32)
# One advantage for each sequence: then the token form has the gradient of the sequence objective.
BY_SEQUENCE = np.where(IDS >= 0, np.array([1.3, -0.4, 0.8, 0.0, 0.0, -1.1, 0.6])[IDS], 0)


def central_difference(function, x, step=1e-6):
    result = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        bump = np.zeros_like(x)
        bump[place] = step
        result[place] = (function(x + bump) - function(x - bump)) / (2 * step)
    return result


def check(loss, x, stands_for=None):
    total = jax.jit(lambda y: jnp.sum(loss(y)))
    target = total if stands_for is None else jax.jit(lambda y: jnp.sum(stands_for(y)))
    gradient = jax.grad(total)(x)
    assert gradient.dtype == np.float64
    np.testing.assert_allclose(gradient, central_difference(target, x), atol=1e-6)
    assert np.abs(gradient).max() > 1e-3


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


X, OLD, BEHAVIOR, A = data()
OBJECTIVES = {
    "ppo_clip": lambda y: al.ppo_clip(y, OLD, A, clip_high=0.28, dual_clip=1.5),
    "ppo_clip without dual clip": lambda y: al.ppo_clip(y, OLD, A, dual_clip=None),
    "decoupled mask": lambda y: al.decoupled_ppo(y, OLD, BEHAVIOR, A, cap=1.5),
    "decoupled clamp": lambda y: al.decoupled_ppo(y, OLD, BEHAVIOR, A, cap=1.5, mode="clamp"),
    "sapo": lambda y: al.sapo(y, OLD, A),
    "reinforce": lambda y: al.reinforce_loss(y, A),
    "k1": lambda y: al.kl_penalty(y, OLD, kind="k1"),
    "k2": lambda y: al.kl_penalty(y, OLD, kind="k2"),
    "k3": lambda y: al.kl_penalty(y, OLD, kind="k3"),
    "value": lambda y: al.value_loss(y, OLD, A, clip=0.3),
    "value without clip": lambda y: al.value_loss(y, OLD, A, clip=None),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient(name):
    check(OBJECTIVES[name], X)


@pytest.mark.parametrize("kind", ["k1+", "k3+"])
def test_corrected_kl_has_the_value_of_one_and_the_gradient_of_k2(kind):
    check(lambda y: al.kl_penalty(y, OLD, kind=kind), X, lambda y: al.kl_penalty(y, OLD, kind="k2"))
    np.testing.assert_array_equal(al.kl_penalty(X, OLD, kind=kind), al.kl_penalty(X, OLD, kind=kind[:2]))


def test_cispo_keeps_a_gradient_on_clipped_tokens():
    ratios = np.clip(np.exp(X - OLD), 0, 1.28)
    check(lambda y: al.cispo(y, OLD, A), X, lambda y: -ratios * A * y)


@pytest.mark.parametrize("function", [al.gspo, al.turn_ratio_clip])
def test_segment_ratios_have_the_gradient_of_the_sequence_objective(function):
    """With weights 1/n_i and one advantage for each sequence."""
    weights = al.loss_weights(IDS >= 0, mode="seq-mean-token-mean", sequence_ids=IDS)
    bounds = {"clip_low": 0.15, "clip_high": 0.2}

    def sequence_objective(logprobs):
        total = 0.0
        numbers = sorted(set(IDS[IDS >= 0].tolist()))
        for number in numbers:
            places = np.nonzero(number == IDS)
            ratio = jnp.exp(jnp.mean((logprobs - OLD)[places]))
            advantage = BY_SEQUENCE[places][0]
            clipped = jnp.clip(ratio, 1 - bounds["clip_low"], 1 + bounds["clip_high"])
            total += jnp.maximum(-advantage * ratio, -advantage * clipped)
        return total / len(numbers)

    check(lambda y: function(y, OLD, BY_SEQUENCE, IDS, **bounds) * weights, X, sequence_objective)


def test_on_policy_ties_keep_the_whole_gradient():
    gradient = jax.grad(lambda y: jnp.sum(al.ppo_clip(y, X, A)))(X)
    np.testing.assert_allclose(gradient, -A, atol=1e-12)
    sequence = jax.grad(lambda y: jnp.sum(al.gspo(y, X, A, IDS)))(X)
    np.testing.assert_allclose(sequence, np.where(IDS >= 0, -A, 0), atol=1e-12)


def test_only_the_first_stream_has_a_gradient():
    def total(old, behavior, advantages):
        losses = (
            al.ppo_clip(X, old, advantages),
            al.gspo(X, old, advantages, IDS),
            al.cispo(X, old, advantages),
            al.sapo(X, old, advantages),
            al.decoupled_ppo(X, old, behavior, advantages),
            al.kl_penalty(X, old),
            al.value_loss(X, old, advantages),
            al.reinforce_loss(X, advantages) * al.tis_weights(old, behavior, IDS >= 0),
        )
        return sum(jnp.sum(loss) for loss in losses)

    for gradient in jax.grad(total, (0, 1, 2))(OLD, BEHAVIOR, A):
        np.testing.assert_array_equal(gradient, np.zeros((B, T)))


@pytest.mark.parametrize("gap", [0.0, 1e3, -1e3])
def test_extreme_log_ratios_stay_finite(gap):
    far = X + gap
    for loss in (
        lambda y: al.ppo_clip(y, far, A),
        lambda y: al.gspo(y, far, A, IDS),
        lambda y: al.turn_ratio_clip(y, far, A, IDS),
        lambda y: al.cispo(y, far, A),
        lambda y: al.sapo(y, far, A),
        lambda y: al.decoupled_ppo(y, far, OLD, A, mode="clamp"),
        lambda y: al.kl_penalty(y, far),
    ):
        value, gradient = jax.value_and_grad(lambda y, loss=loss: jnp.sum(loss(y)))(X)
        assert np.isfinite(value) and np.isfinite(gradient).all()
