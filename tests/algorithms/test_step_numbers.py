"""The worked numbers of the methods that credit steps, as they are and compiled.

The example: three attempts at one task, the first wins. Its observations 0, 1, 2 hold a cycle 1 <-> 2.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax import algorithms as al
from empg_jax.algorithms.graph import goal_distances, make_graph
from empg_jax.algorithms.graph_credit import graph_gae

MASK = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1]], bool)
ANCHORS = np.int32([[0, 1, -1], [0, 2, 1], [0, 1, 2]])
A, B, C, D, E, F, G = range(7)
ACTIONS = np.int32([[A, C, -1], [B, D, E], [A, G, F]])
SUCCESS = np.array([True, False, False])
RETURNS = np.float32([1, 0, 0])
ONE = np.zeros(3, np.int32)
GRPO = [1.154701, -0.577350, -0.577350]


@pytest.fixture(params=["plain", "jit"])
def run(request):
    """Calls ``f(*arrays, **keywords)`` as it is or compiled."""

    def call(function, *arrays, **keywords):
        bound = functools.partial(function, **keywords)
        return (jax.jit(bound) if request.param == "jit" else bound)(*arrays)

    return call


def assert_rows(found, rows, mask=MASK, atol=2e-5):
    expected = np.zeros(mask.shape)
    for i, row in enumerate(rows):
        expected[i, : len(row)] = row
    np.testing.assert_allclose(found, expected, atol=atol)


# ------------------------------------------------------------------------------------------ the state graph


@pytest.mark.parametrize(
    ("beta", "sweeps", "values"),
    [
        (0.5, 700, [3 / 46, 4 / 23, 1 / 23]),
        (0.98, 700, [0.316347, 0.388920, 0.190571]),
        (0.5, 1, [0, 1 / 6, 0]),
        (0.5, 2, [0.055556, 1 / 6, 1 / 24]),
        (0.5, 4, [0.064815, None, None]),
    ],
)
def test_values_of_the_graph(run, beta, sweeps, values):
    def solve(success, anchors, mask, groups):
        graph = make_graph(success, anchors, mask, groups)
        return graph.src, *al.closure_values(*graph[:3], beta=beta, sweeps=sweeps)

    src, table, residual = run(solve, SUCCESS, ANCHORS, MASK, ONE)
    nodes = [src[np.flatnonzero(ANCHORS.ravel() == state)[0]] for state in range(3)]
    for node, value in zip(nodes, values, strict=True):
        assert value is None or abs(float(table[node]) - value) < 1e-6
    assert (float(residual) == 0) == (sweeps == 700)


def test_distances_of_the_graph(run):
    def solve(success, anchors, mask, groups):
        graph = make_graph(success, anchors, mask, groups)
        return graph.src, goal_distances(graph, sweeps=64)[0]

    src, table = run(solve, SUCCESS, ANCHORS, MASK, ONE)
    nodes = [src[np.flatnonzero(ANCHORS.ravel() == state)[0]] for state in range(3)]
    assert [float(table[node]) for node in nodes] == [2, 1, 2]
    assert float(table[9]) == 0 and float(table[10]) == np.inf


CRBC = [[2.241657, 8.220536], [-2.751263, 1.596563, -4.345796], [0.509606, -3.874740, -2.751263]]


def test_crbc(run):
    arrays = (RETURNS, SUCCESS, ANCHORS, ACTIONS, MASK, ONE)
    assert_rows(run(al.crbc, *arrays, beta=0.5), CRBC)
    step = run(al.crbc, *arrays, beta=0.5, weight=1.0, trajectory_weight=0.0)
    assert_rows(
        step, [[0.217391, 1.413167], [-0.434783, 0.434783, -0.753689], [0.217391, -0.659478, -0.434783]]
    )
    step = run(al.crbc, *arrays, weight=1.0, trajectory_weight=0.0)
    assert_rows(step, [[0.647940, 1.391254], [-1.295881, 1, -0.915419], [0.647940, -0.475835, -1]])


def test_aem_keeps_the_direction_of_a_step(run):
    entropies = np.float32([[0.9, 0.4, 0], [0.5, 0.7, 0.2], [0.8, 0.6, 0.3]])
    base = run(al.crbc, RETURNS, SUCCESS, ANCHORS, ACTIONS, MASK, ONE, beta=0.5)
    found = run(lambda a, h, m, g: al.aem(a, h, m, group_ids=g), base, entropies, MASK, ONE)
    rows = [[1.289461, 9.659384], [-2.802460, 1.222107, -6.795208], [0.338155, -3.421431, -3.729267]]
    assert_rows(found, rows)


def test_graph_hca(run):
    arrays = (RETURNS, SUCCESS, ANCHORS, MASK, ONE)
    step = [[0.707107, 1.343435], [-1.414214, 1, -1.054323], [0.707107, -0.289112, -1]]
    found = np.asarray(run(al.graph_hca, *arrays, gamma=0.5))
    assert_rows(found - np.asarray(GRPO)[:, None] * MASK, step)
    assert_rows(run(al.graph_hca, *arrays, weight=0.0), [[GRPO[0]] * 2, [GRPO[1]] * 3, [GRPO[2]] * 3])


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_graft(run, lam):
    """λ changes nothing here: all moves out of 1 and 2 differ, so their mean is that of the fixed point."""
    found = run(al.graft, SUCCESS, ANCHORS, ACTIONS, MASK, ONE, gamma=0.5, lam=lam)
    rows = [[0.707084, 1.413161], [-1.414168, 0.999977, -0.753686], [0.707084, -0.659475, -0.999977]]
    assert_rows(found, rows)


def test_graft_counts_distinct_moves_once(run):
    """``0 -a-> 1 -c-> WIN`` twice and ``0 -b-> 1 -e-> LOSE``: the winning move weighs 1 of 2, not 2 of 3."""
    success, mask = np.array([True, True, False]), np.ones((3, 2), bool)
    anchors, actions = np.int32([[0, 1]] * 3), np.int32([[A, C], [A, C], [B, E]])

    def edges(success, anchors, mask, actions, lam):
        return graph_gae(
            make_graph(success, anchors, mask, ONE), actions, gamma=0.5, lam=lam, sweeps=100
        ).reshape(3, 2)

    plain = run(functools.partial(edges, lam=0.0), success, anchors, mask, actions)
    np.testing.assert_allclose(plain, [[0, 1 / 6], [0, 1 / 6], [0, -1 / 3]], atol=1e-6)
    found = run(functools.partial(edges, lam=0.5), success, anchors, mask, actions)
    np.testing.assert_allclose(np.asarray(found)[:, 0], -1 / 48, atol=1e-6)


def test_graph_gpo(run):
    found = np.asarray(run(al.graph_gpo, RETURNS, SUCCESS, ANCHORS, MASK, ONE))
    step = [[0.577349, 1.154665], [-1.154698, 0.707106, -0.585170], [0.577349, -0.569495, -0.707106]]
    assert_rows(found - np.asarray(GRPO)[:, None] * MASK, step)


# ------------------------------------------------------------------------------------------ groups and turns

RETURNS_TO_GO = np.float32([[0.5, 1, 9], [0, 0, 0], [0, 0, 0]])
HGPO = {
    2.0: [[0.333333, 0.566667], [-0.166667, 0, -0.333333], [-0.166667, -0.433333, 0]],
    1.0: [[0.333333, 0.555556], [-0.166667, 0, -0.333333], [-0.166667, -0.444444, 0]],
}


@pytest.mark.parametrize("offset", HGPO)
def test_hgpo(run, offset):
    found = run(
        al.hgpo, RETURNS_TO_GO, ANCHORS, MASK, ONE, history=1, scale_by_std=False, level_offset=offset
    )
    assert_rows(found, HGPO[offset])


def test_hgpo_scaled(run):
    found = run(al.hgpo, RETURNS_TO_GO, ANCHORS, MASK, ONE, history=1)
    assert_rows(found, [[1.414207, 1.165683], [-0.707103, 0, -0.707105], [-0.707103, -0.882841, 0]])


def test_hgpo_without_a_history_is_the_step_part_of_gigpo(run):
    found = run(al.hgpo, RETURNS_TO_GO, ANCHORS, MASK, ONE, history=0, scale_by_std=False)
    step = run(al.gigpo, np.zeros(3, np.float32), RETURNS_TO_GO, ANCHORS, MASK, ONE)
    np.testing.assert_allclose(found, step, atol=1e-6)


def test_gagpo(run):
    rewards = np.float32([[0, 1, 9], [0, 0, 0], [0, 0, 0]])
    plain = run(al.gagpo, rewards, ANCHORS, MASK, ONE, gamma=0.5, lam=0.5, normalize="none")
    assert_rows(plain, [[1 / 6, 2 / 3], [-7 / 48, 1 / 12, -1 / 3], [-1 / 12, -1 / 3, 0]])
    found = run(al.gagpo, rewards, ANCHORS, MASK, ONE, gamma=0.5, lam=0.5)
    rows = [[0.508195, 2.056980], [-0.459796, 0.250064, -1.040590], [-0.266197, -1.040590, -0.008067]]
    assert_rows(found, rows)


def test_turn_gae(run):
    values, mask = np.float32([[0.2, 0.4, 0.7]] * 2), np.ones((2, 3), bool)
    rewards, bootstrap = np.float32([[0, 0, 1], [0, 0, 0]]), np.float32([0, 0.5])
    found, targets = run(
        lambda r, v, m, b: al.turn_gae(r, v, m, bootstrap=b), rewards, values, mask, bootstrap
    )
    assert_rows(found, [[0.695227, 0.560300, 0.3], [0.294317, 0.110345, -0.205]], mask)
    np.testing.assert_allclose(targets[0], [0.895227, 0.960300, 1], atol=2e-6)


def test_beacon(run):
    reached = np.array([[0, 1, 0, 1], [0, 1, 0, 0]], bool)
    mask = np.ones((2, 4), bool)
    found = run(al.beacon, np.float32([10, 0]), reached, mask, np.int32([0, 0]), gamma=0.5)
    assert_rows(found, [[2.5, 7.5, 6.25, 11.25], [-7.5, -2.5, -8.75, -8.75]], mask)


P = np.log(np.float32([[0.10, 0.30, 0.25, 9], [0.10, 0.20, 9, 9]]))
OUTCOMES, PAIR = np.float32([1, 0]), np.zeros(2, np.int32)
GAINING = np.array([[1, 1, 1], [1, 1, 0]], bool)


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("joint", [[1.039748, 1.169716, 1.949527], [-1.039748, -0.649842]]),
        ("separate", [[0.837778, -0.297760, 0.999998], [-0.837778, -0.999998]]),
    ],
)
def test_igpo(run, kind, rows):
    assert_rows(run(al.igpo, P, OUTCOMES, GAINING, PAIR, normalize=kind), rows, GAINING)


def test_a2tgpo(run):
    gains = run(al.information_gains, P, GAINING)
    assert_rows(gains, [[0.2, -0.05], [0.1]], GAINING)
    found, clip = run(al.a2tgpo, gains, OUTCOMES, GAINING, PAIR)
    assert_rows(found, [[1.212125, 0.999998, 0.999998], [-1.299991, -0.999998]], GAINING)
    assert_rows(clip, [[1.138633, 1, 1], [0.861367, 1]], GAINING)


# ------------------------------------------------------------------------------------------------- losses


def test_entropy_ratio(run):
    new, old = np.float32([[1.04, 0.46, 0.02, 1.06, 0.94]]), np.float32([[1, 0.5, 0.02, 1, 1]])
    kept = run(al.entropy_ratio_mask, new, old, np.ones((1, 5), bool))
    np.testing.assert_array_equal(kept, [[True, False, True, False, False]])
    junk = run(al.entropy_ratio_mask, new * np.nan, old, np.zeros((1, 5), bool))
    assert not np.asarray(junk).any()


PI, OLD, REF = (np.float32(p) for p in ([0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.3, 0.3, 0.4]))


def test_the_kl_of_older_samples(run):
    """Value and gradient in the logits, summed over what the older policy would sample."""
    found = run(
        lambda new, ref, old: al.kl_penalty(new, ref, kind="k3_is", old_logprobs=old), *np.log([PI, REF, OLD])
    )
    np.testing.assert_allclose(found, [0.231777, 0, 0.806853], atol=1e-6)
    np.testing.assert_allclose(OLD @ np.asarray(found), 0.277259, atol=1e-6)

    def mean(logits, kind):
        new = jax.nn.log_softmax(logits)
        more = {"old_logprobs": jnp.log(OLD)} if kind == "k3_is" else {}
        return jnp.sum(OLD * al.kl_penalty(new, jnp.log(REF), kind=kind, **more))

    gradient = run(jax.grad(functools.partial(mean, kind="k3_is")), np.log(PI))
    np.testing.assert_allclose(gradient, [0.249533, -0.083178, -0.166355], atol=1e-5)
    exact = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - np.log(REF))))(np.log(PI))
    np.testing.assert_allclose(gradient, exact, atol=1e-5)
    plain = run(jax.grad(functools.partial(mean, kind="k3")), np.log(PI))
    assert np.abs(np.asarray(plain) - exact).max() > 0.1


def test_one_ratio_for_a_turn(run):
    """SAMPO's numbers: log-ratios of one row, its geometric mean inside and below the range 3e-3 / 4e-3."""
    change = np.float32([[0.002, 0.004, -0.001, 0.005]])
    advantages, ids = np.float32([[1.2, 1.2, 0.4, 0.4]]), np.zeros((1, 4), np.int32)
    bounds = {"clip_low": 3e-3, "clip_high": 4e-3}
    for shift, ratio, mean in ((0.0, 1.002503, -0.802003), (-0.006, 0.996506, -0.797205)):
        loss = run(al.gspo, change + np.float32(shift), 0 * change, advantages, ids, **bounds)
        np.testing.assert_allclose(loss, -advantages * ratio, atol=1e-5)
        np.testing.assert_allclose(np.mean(loss), mean, atol=1e-5)


@pytest.mark.parametrize(("kind", "ratio"), [("mean", np.exp(0.0025)), ("product", np.exp(0.01))])
def test_a_turns_ratio_is_a_mean_or_a_product(run, kind, ratio):
    change = np.float32([[0.002, 0.004, -0.001, 0.005, 0.7]])
    advantages, ids = np.float32([[1, 1, -1, -1, 5]]), np.int32([[3, 3, 3, 3, -1]])

    def total(new):
        return jnp.sum(al.turn_ratio_clip(new, jnp.zeros_like(new), advantages, ids, ratio=kind))

    gradient = run(jax.grad(total), change)
    np.testing.assert_allclose(gradient, [[-ratio, -ratio, ratio, ratio, 0]], rtol=1e-5)
