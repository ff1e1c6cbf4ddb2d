"""The worked numbers of the methods that credit steps, as they are and compiled: one program for all of them.

The example: three attempts at one task, the first wins. Its observations 0, 1, 2 hold a cycle 1 <-> 2.
"""

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
STATES = (0, 1, 4)  # places of the first visits to 0, 1, 2 in the flat table
GRPO = np.array([[1.154701], [-0.577350], [-0.577350]]) * MASK

# A second graph: ``0 -a-> 1 -c-> WIN`` twice and ``0 -b-> 1 -e-> LOSE``.
TWICE = (np.array([True, True, False]), np.int32([[0, 1]] * 3), np.ones((3, 2), bool), ONE)
TWICE_ACTIONS = np.int32([[A, C], [A, C], [B, E]])

TO_GO = np.float32([[0.5, 1, 9], [0, 0, 0], [0, 0, 0]])
REWARDS = np.float32([[0, 1, 9], [0, 0, 0], [0, 0, 0]])
ENTROPIES = np.float32([[0.9, 0.4, 0], [0.5, 0.7, 0.2], [0.8, 0.6, 0.3]])
GAE = (np.float32([[0, 0, 1], [0, 0, 0]]), np.float32([[0.2, 0.4, 0.7]] * 2), np.ones((2, 3), bool))
REACHED = np.array([[0, 1, 0, 1], [0, 1, 0, 0]], bool)
PAIR = np.zeros(2, np.int32)
P = np.log(np.float32([[0.10, 0.30, 0.25, 9], [0.10, 0.20, 9, 9]]))
OUTCOMES, GAINING = np.float32([1, 0]), np.array([[1, 1, 1], [1, 1, 0]], bool)
H_NEW, H_OLD = np.float32([[1.04, 0.46, 0.02, 1.06, 0.94]]), np.float32([[1, 0.5, 0.02, 1, 1]])
PI, OLD, REF = (np.float32(p) for p in ([0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.3, 0.3, 0.4]))


# Values of 0, 1, 2: at the fixed point (an exact one in float32), and after few sweeps.
VALUES = {
    "0.5, 700 sweeps": [3 / 46, 4 / 23, 1 / 23],
    "0.98, 700 sweeps": [0.316347, 0.388920, 0.190571],
    "0.5, 1 sweep": [0, 1 / 6, 0],
    "0.5, 2 sweeps": [0.055556],
    "0.5, 4 sweeps": [0.064815],
}
SOLVED = {name: (float(name.split(",")[0]), int(name.split()[1])) for name in VALUES}


def ends(*anchors):
    return {"fail_node": "observation", "last_anchor_ids": np.int32(anchors)}


def compute_graphs():
    graph = make_graph(*map(jnp.asarray, (SUCCESS, ANCHORS, MASK, ONE)))
    twice = make_graph(*map(jnp.asarray, TWICE))
    place = (SUCCESS, ANCHORS, MASK, ONE)
    acts = (SUCCESS, ANCHORS, ACTIONS, MASK, ONE)
    step = {"weight": 1.0, "trajectory_weight": 0.0}
    whole = al.crbc(RETURNS, *acts, beta=0.5)
    return {
        "nodes": graph.src,
        **{name: al.closure_values(*graph[:3], beta=beta, sweeps=n) for name, (beta, n) in SOLVED.items()},
        "distances": goal_distances(graph, sweeps=64)[0],
        "crbc": whole,
        "crbc, aem": al.aem(whole, ENTROPIES, MASK, group_ids=ONE),
        "crbc, steps": al.crbc(RETURNS, *acts, beta=0.5, **step),
        "crbc, own beta": al.crbc(RETURNS, *acts, **step),
        "graph_hca": al.graph_hca(RETURNS, *place, gamma=0.5) - np.float32(GRPO),
        "graph_hca, weight 0": al.graph_hca(RETURNS, *place, weight=0.0),
        "graft": al.graft(*acts, gamma=0.5),
        "graft, lambda": al.graft(*acts, gamma=0.5, lam=0.5),
        "edges": graph_gae(twice, TWICE_ACTIONS, gamma=0.5, lam=0.0, sweeps=100),
        "edges, lambda": graph_gae(twice, TWICE_ACTIONS, gamma=0.5, lam=0.5, sweeps=100),
        "graph_gpo": al.graph_gpo(RETURNS, *place) - np.float32(GRPO),
        "graph_gpo, ends seen": al.graph_gpo(RETURNS, *place, **ends(0, 2, 9)) - np.float32(GRPO),
        "graph_gpo, ends unknown": al.graph_gpo(RETURNS, *place, **ends(-1, -1, -1)) - np.float32(GRPO),
    }


def compute_turns():
    place = (ANCHORS, MASK, ONE)
    gains = al.information_gains(P, GAINING)
    half = {"gamma": 0.5, "lam": 0.5}
    return {
        "hgpo": al.hgpo(TO_GO, *place, history=1, scale_by_std=False),
        "hgpo, paper": al.hgpo(TO_GO, *place, history=1, scale_by_std=False, level_offset=1.0),
        "hgpo, scaled": al.hgpo(TO_GO, *place, history=1),
        "hgpo, no history": al.hgpo(TO_GO, *place, history=0, scale_by_std=False),
        "gigpo's steps": al.gigpo(np.zeros(3, np.float32), TO_GO, *place),
        "gagpo, plain": al.gagpo(REWARDS, *place, **half, normalize="none"),
        "gagpo": al.gagpo(REWARDS, *place, **half),
        "turn_gae": al.turn_gae(*GAE, bootstrap=np.float32([0, 0.5])),
        "beacon": al.beacon(np.float32([10, 0]), REACHED, np.ones((2, 4), bool), PAIR, gamma=0.5),
        "gains": gains,
        "igpo, joint": al.igpo(P, OUTCOMES, GAINING, PAIR),
        "igpo, separate": al.igpo(P, OUTCOMES, GAINING, PAIR, normalize="separate"),
        "a2tgpo": al.a2tgpo(gains, OUTCOMES, GAINING, PAIR),
    }


def mean_kl(logits, kind):
    more = {"old_logprobs": jnp.log(OLD)} if kind == "k3_is" else {}
    return jnp.sum(OLD * al.kl_penalty(jax.nn.log_softmax(logits), jnp.log(REF), kind=kind, **more))


def exact_kl(logits):
    return jnp.sum(jax.nn.softmax(logits) * (jax.nn.log_softmax(logits) - jnp.log(REF)))


def sum_of_turn(new, kind):
    advantages, ids = np.float32([[1, 1, -1, -1, 5]]), np.int32([[3, 3, 3, 3, -1]])
    return jnp.sum(al.turn_ratio_clip(new, jnp.zeros_like(new), advantages, ids, ratio=kind))


CHANGE = np.float32([[0.002, 0.004, -0.001, 0.005]])
WORTH = np.float32([[1.2, 1.2, 0.4, 0.4]])


def compute_losses():
    row, bounds = np.zeros((1, 4), np.int32), {"clip_low": 3e-3, "clip_high": 4e-3}
    turn = jnp.concatenate([jnp.asarray(CHANGE), jnp.full((1, 1), 0.7)], axis=1)
    every = np.ones((1, 5), bool)
    kl = al.kl_penalty(np.log(PI), np.log(REF), kind="k3_is", old_logprobs=np.log(OLD))
    gradients = {kind: jax.grad(mean_kl)(jnp.log(PI), kind) for kind in ("k3_is", "k3")}
    return {
        "entropy ratio": al.entropy_ratio_mask(H_NEW, H_OLD, every),
        "entropy ratio, junk": al.entropy_ratio_mask(H_NEW * np.float32(np.nan), H_OLD, ~every),
        "kl": kl,
        "kl, slopes": gradients | {"exact": jax.grad(exact_kl)(jnp.log(PI))},
        "sampo": al.gspo(CHANGE, 0 * CHANGE, WORTH, row, **bounds),
        "sampo, below": al.gspo(CHANGE - np.float32(0.006), 0 * CHANGE, WORTH, row, **bounds),
        "turn": {kind: jax.grad(sum_of_turn)(turn, kind) for kind in ("mean", "product")},
    }


@pytest.fixture(
    scope="module", params=[pytest.param("plain", marks=[pytest.mark.slow, pytest.mark.long]), "jit"]
)
def found(request):
    """The results, by name."""
    calls = (compute_graphs, compute_turns, compute_losses)
    results = [(jax.jit(call) if request.param == "jit" else call)() for call in calls]
    return {name: jax.tree.map(np.asarray, value) for result in results for name, value in result.items()}


TABLES = {
    "crbc": [[2.241657, 8.220536], [-2.751263, 1.596563, -4.345796], [0.509606, -3.874740, -2.751263]],
    "crbc, aem": [[1.289461, 9.659384], [-2.802460, 1.222107, -6.795208], [0.338155, -3.421431, -3.729267]],
    "crbc, steps": [
        [0.217391, 1.413167],
        [-0.434783, 0.434783, -0.753689],
        [0.217391, -0.659478, -0.434783],
    ],
    "crbc, own beta": [[0.647940, 1.391254], [-1.295881, 1, -0.915419], [0.647940, -0.475835, -1]],
    "graph_hca": [[0.707107, 1.343435], [-1.414214, 1, -1.054323], [0.707107, -0.289112, -1]],
    "graph_hca, weight 0": [[1.154701] * 2, [-0.577350] * 3, [-0.577350] * 3],
    "graft": [[0.707084, 1.413161], [-1.414168, 0.999977, -0.753686], [0.707084, -0.659475, -0.999977]],
    "graph_gpo": [
        [0.577349, 1.154665],
        [-1.154698, 0.707106, -0.585170],
        [0.577349, -0.569495, -0.707106],
    ],
    # The first failure ends in state 2, two moves from the goal, as its companion's move g does: both are
    # worth 0.1 beside the winner's 10. The second ends in a state that nobody left: 3 moves, as LOSE.
    "graph_gpo, ends seen": [
        [0.577349, 1.154700],
        [-1.154698, 0.707106, -0.577350],
        [0.577349, -0.577350, -0.707106],
    ],
    "graph_gpo, ends unknown": [
        [0.577349, 1.154665],
        [-1.154698, 0.707106, -0.585170],
        [0.577349, -0.569495, -0.707106],
    ],
    "hgpo": [[0.333333, 0.566667], [-0.166667, 0, -0.333333], [-0.166667, -0.433333, 0]],
    "hgpo, paper": [[0.333333, 0.555556], [-0.166667, 0, -0.333333], [-0.166667, -0.444444, 0]],
    "hgpo, scaled": [[1.414207, 1.165683], [-0.707103, 0, -0.707105], [-0.707103, -0.882841, 0]],
    "gagpo, plain": [[1 / 6, 2 / 3], [-7 / 48, 1 / 12, -1 / 3], [-1 / 12, -1 / 3, 0]],
    "gagpo": [[0.508195, 2.056980], [-0.459796, 0.250064, -1.040590], [-0.266197, -1.040590, -0.008067]],
    "beacon": [[2.5, 7.5, 6.25, 11.25], [-7.5, -2.5, -8.75, -8.75]],
    "gains": [[0.2, -0.05], [0.1]],
    "igpo, joint": [[1.039748, 1.169716, 1.949527], [-1.039748, -0.649842]],
    "igpo, separate": [[0.837778, -0.297760, 0.999998], [-0.837778, -0.999998]],
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(found, name):
    expected = np.zeros(found[name].shape)
    for i, row in enumerate(TABLES[name]):
        expected[i, : len(row)] = row
    np.testing.assert_allclose(found[name], expected, atol=2e-5)


def test_the_state_graph(found):
    for name, expected in VALUES.items():
        values, residual = found[name]
        for state, value in zip(STATES, expected, strict=False):
            assert abs(values[found["nodes"][state]] - value) < 1e-6, name
        assert (residual == 0) == ("700" in name)  # no change at all: further sweeps would give the same
    distances = found["distances"]
    assert [distances[found["nodes"][state]] for state in STATES] == [2, 1, 2]
    assert distances[9] == 0 and distances[10] == np.inf


def test_graft_counts_distinct_moves_once(found):
    """The winning move weighs 1 of 2, not 2 of 3; where all moves differ, lambda changes nothing."""
    np.testing.assert_allclose(found["edges"], [0, 1 / 6, 0, 1 / 6, 0, -1 / 3], atol=1e-6)
    np.testing.assert_allclose(found["edges, lambda"][::2], -1 / 48, atol=1e-6)
    np.testing.assert_allclose(found["graft, lambda"], found["graft"], atol=1e-5)


def test_hgpo_without_a_history_is_the_step_part_of_gigpo(found):
    np.testing.assert_allclose(found["hgpo, no history"], found["gigpo's steps"], atol=1e-5)


def test_turn_gae(found):
    advantages, targets = found["turn_gae"]
    expected = [[0.695227, 0.560300, 0.3], [0.294317, 0.110345, -0.205]]
    np.testing.assert_allclose(advantages, expected, atol=2e-6)
    np.testing.assert_allclose(targets[0], [0.895227, 0.960300, 1], atol=2e-6)


def test_a2tgpo(found):
    advantages, clip = found["a2tgpo"]
    expected = [[1.212125, 0.999998, 0.999998], [-1.299991, -0.999998, 0]]
    np.testing.assert_allclose(advantages, expected, atol=2e-5)
    np.testing.assert_allclose(clip, [[1.138633, 1, 1], [0.861367, 1, 0]], atol=2e-6)


def test_entropy_ratio(found):
    np.testing.assert_array_equal(found["entropy ratio"], [[True, False, True, False, False]])
    assert not found["entropy ratio, junk"].any()


def test_the_kl_of_older_samples(found):
    """Value and gradient in the logits, over what the older policy would sample."""
    np.testing.assert_allclose(found["kl"], [0.231777, 0, 0.806853], atol=1e-6)
    np.testing.assert_allclose(OLD @ found["kl"], 0.277259, atol=1e-6)
    slopes = found["kl, slopes"]
    np.testing.assert_allclose(slopes["k3_is"], [0.249533, -0.083178, -0.166355], atol=1e-5)
    np.testing.assert_allclose(slopes["k3_is"], slopes["exact"], atol=1e-5)
    np.testing.assert_allclose(slopes["k3"], [0.46, 0.105, -0.565], atol=1e-4)


def test_one_ratio_for_a_turn(found):
    """SAMPO's: one inside the range 3e-3 / 4e-3, one below it."""
    for name, ratio, mean in (("sampo", 1.002503, -0.802003), ("sampo, below", 0.996506, -0.797205)):
        np.testing.assert_allclose(found[name], -WORTH * ratio, atol=1e-5)
        np.testing.assert_allclose(np.mean(found[name]), mean, atol=1e-5)


def test_a_turns_ratio_is_a_mean_or_a_product(found):
    for kind, ratio in (("mean", np.exp(0.0025)), ("product", np.exp(0.01))):
        expected = [[-ratio, -ratio, ratio, ratio, 0]]
        np.testing.assert_allclose(found["turn"][kind], expected, rtol=1e-5)
