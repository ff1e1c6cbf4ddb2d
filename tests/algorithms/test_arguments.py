"""Types, shapes and choices: what is accepted, and how the rest is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax import algorithms as al
from empg_jax.algorithms.masking import check_shapes

N, K = 4, 3
BASE = np.linspace(-1, 1, N * K).reshape(N, K)
H = np.linspace(0, 2, N * K).reshape(N, K) ** 2
MASK = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 0]])
GROUPS = np.array([0, 0, 2, -1], np.int32)


@pytest.mark.parametrize("mask_type", [bool, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("device", [False, True])
def test_masks_never_change_the_type(mask_type, dtype, device):
    with jax.enable_x64(True):
        put = jnp.asarray if device else np.asarray
        base, entropies, mask = put(BASE.astype(dtype)), put(H.astype(dtype)), put(MASK.astype(mask_type))
        result = al.empg(base, entropies, mask, group_ids=put(GROUPS))
        assert result.dtype == dtype
        np.testing.assert_allclose(result, al.empg(BASE, H, MASK > 0, group_ids=GROUPS), atol=1e-6)


def test_results_have_the_promoted_type():
    with jax.enable_x64(True):
        assert al.empg(BASE.astype(np.float32), H, MASK).dtype == np.float64
        assert al.grpo(np.array([1, 0, 1, 0]), GROUPS).dtype == np.float32
        low = jnp.zeros((2, 2), jnp.bfloat16)
        assert al.ppo_clip(low, low, low).dtype == np.float32


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: al.empg(BASE, H, MASK, scope="turn"), "scope='turn'.*'batch', 'group', 'trajectory'"),
        (lambda: al.empg(BASE, H, MASK, scope="group"), "needs group_ids"),
        (lambda: al.empg(BASE, H, MASK, center="batch"), "center='batch'.*'turn', 'token', 'none'"),
        (lambda: al.empg(BASE, H, MASK, center="token"), "needs token_counts"),
        (lambda: al.aem(BASE, H, MASK, group_ids=GROUPS, scope="all"), "scope='all'"),
        (lambda: al.aem(BASE, H, MASK, group_ids=GROUPS, mean="token"), "needs token_counts"),
        (lambda: al.grpo(BASE[:, 0], GROUPS, singleton="nan"), "singleton='nan'.*'zero', 'raw'"),
        (lambda: al.rloo(BASE[:, 0], GROUPS, singleton="nan"), "singleton='nan'"),
        (lambda: al.reinforce(BASE[:, 0], baseline="mean"), "baseline='mean'.*'batch_mean', 'none'"),
        (lambda: al.ppo_clip(BASE, BASE, BASE, dual_clip=1.0), "dual_clip=1.0 must be above 1"),
        (lambda: al.kl_penalty(BASE, BASE, kind="k4"), "kind='k4'.*'k1', 'k2', 'k3'"),
        (lambda: al.loss_weights(MASK, mode="mean"), "mode='mean'.*'token-mean'"),
        (lambda: al.loss_weights(MASK, mode="token-mean", scale=3), "scale is used by"),
        (lambda: al.decoupled_ppo(BASE, BASE, BASE, BASE, mode="drop"), "mode='drop'.*'mask', 'clamp'"),
        (lambda: al.tis_weights(BASE, BASE, MASK, level="turn"), "level='turn'"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_shapes_are_refused_rather_than_broadcast():
    """Without the annotations' run-time check, as in users' code, the functions check for themselves."""
    with pytest.raises(ValueError, match=r"must have one shape, got a \(4, 3\), b \(1, 3\)"):
        check_shapes(a=BASE, b=BASE[:1])
    with pytest.raises((ValueError, TypeError)):
        al.empg(BASE, H[:1], MASK)


def test_hyper_parameters_may_be_traced_or_of_any_number_type():
    plain = al.empg(BASE, H, MASK, k=1, zeta=np.float64(0.1))
    traced = jax.jit(lambda k, zeta: al.empg(BASE, H, MASK, k=k, zeta=zeta))(1, 0.1)
    np.testing.assert_allclose(plain, traced, atol=1e-6)


def test_singletons():
    returns, groups = np.float32([3, 1, 2, 9]), np.int32([0, 1, 1, -1])
    np.testing.assert_allclose(al.grpo(returns, groups, scale_by_std=False), [0, -0.5, 0.5, 0])
    np.testing.assert_allclose(
        al.grpo(returns, groups, scale_by_std=False, singleton="raw"), [3, -0.5, 0.5, 0]
    )
    np.testing.assert_allclose(al.grpo(returns, groups, singleton="raw")[0], 3 / (1 + 1e-6), rtol=1e-6)
    np.testing.assert_allclose(al.rloo(returns, groups, singleton="raw"), [3, -1, 1, 0])


def test_one_rollout_for_each_task_falls_back_to_the_batch():
    own = np.arange(N, dtype=np.int32)
    with pytest.warns(UserWarning, match='falls back to scope="batch"'):
        result = al.aem(BASE, H, MASK, group_ids=own)
    np.testing.assert_allclose(result, al.aem(BASE, H, MASK, group_ids=own, scope="batch"))
    compiled = jax.jit(lambda ids: al.aem(BASE, H, MASK, group_ids=ids))(own)
    np.testing.assert_allclose(compiled, result, atol=1e-6)


def test_next_turn_is_the_next_one_that_exists():
    """Row 1 has an empty turn in the middle: its bonus comes from turn 2."""
    result = np.asarray(al.empg(0 * BASE, H, MASK, zeta=1.0, center="none"))
    normal = (H - H[MASK > 0].min()) / np.ptp(H[MASK > 0])
    np.testing.assert_allclose(result[1], [np.exp(-normal[1, 2]), 0, 0], rtol=1e-5)


def test_inactive_trajectories_count_as_absent():
    active = np.array([True, True, False, True])
    result = np.asarray(al.empg(BASE, H, MASK, active_mask=active))
    without = np.asarray(al.empg(BASE, H, MASK * active[:, None]))
    np.testing.assert_array_equal(result, without)
    np.testing.assert_array_equal(
        al.has_spread(np.float32([1, 1, 2, 3]), np.int32([0, 0, 1, 1])), [0, 0, 1, 1]
    )


def test_whitened_empg_is_whiten_of_empg():
    plain = al.empg(BASE, H, MASK)
    np.testing.assert_allclose(al.empg(BASE, H, MASK, whiten=True), al.whiten(plain, MASK), atol=1e-5)


def test_reversed_aem_favors_uncertain_turns():
    groups, units = np.zeros(N, np.int32), np.ones((N, K))
    normal = (H - H[MASK > 0].min()) / np.ptp(H[MASK > 0])
    expected = np.exp(normal) / np.exp(normal)[MASK > 0].mean() * MASK
    np.testing.assert_allclose(al.aem(units, H, MASK, group_ids=groups, reverse=True), expected, rtol=1e-5)


def test_centered_aem_has_mean_zero():
    result = np.asarray(al.aem(BASE, H, MASK, group_ids=GROUPS, center="turn"))
    np.testing.assert_allclose(result[:3][MASK[:3] > 0].mean(), 0, atol=1e-6)


def test_theory_by_monte_carlo():
    logits = jnp.asarray([1.2, -0.3, 0.4, 2.0])
    actions = jax.random.categorical(jax.random.key(0), logits, shape=(100_000,))
    scores = jax.nn.one_hot(actions, 4) - jax.nn.softmax(logits)[None]
    measured = float(jnp.mean(jnp.sum(scores**2, axis=1)))
    np.testing.assert_allclose(measured, al.score_norm_sq(logits), atol=5e-3)
    np.testing.assert_allclose(1 - np.exp(-al.renyi2_entropy(logits)), al.score_norm_sq(logits), rtol=1e-5)


def test_entropy_drift_is_the_derivative_along_the_flow():
    logits = np.float64([1.2, -0.3, 0.4, 2.0])
    policy = np.exp(logits) / np.exp(logits).sum()

    def entropy(p):
        return -(p * np.log(p)).sum()

    step = 1e-6
    for action in range(4):
        moved = policy + step * 0.7 * (np.eye(4)[action] - policy)
        measured = (entropy(moved) - entropy(policy)) / step
        np.testing.assert_allclose(al.entropy_drift(logits, action, 0.7), measured, atol=1e-4)
