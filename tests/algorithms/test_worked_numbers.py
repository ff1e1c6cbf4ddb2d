"""The worked numbers of the specification, each run as is and compiled."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from empg_jax import algorithms as al

DATA = json.loads((pathlib.Path(__file__).parent / "data" / "example.json").read_text())
EXAMPLE = {name: np.asarray(values) for name, values in DATA.items()}
RETURNS = EXAMPLE["R"].astype(np.float32)
PAIRS = EXAMPLE["group"].astype(np.int32)
ONE = np.zeros(4, np.int32)
H = EXAMPLE["H"].astype(np.float32)
TURNS = EXAMPLE["step_mask"]
TOKENS = EXAMPLE["tok_mask"]
ROW = np.broadcast_to(np.arange(4, dtype=np.int32)[:, None], TOKENS.shape)
TURN_OF = EXAMPLE["turn_id"].astype(np.int32)
BASE = np.broadcast_to(np.float32([0.5, -0.5, -0.375, 0.375])[:, None], H.shape)


def spread_copies(function, arrays):
    """Two copies under vmap, the rows of each over four devices; both must give the same."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("copy", "rows"))

    def put(x):
        copies = jnp.stack([jnp.asarray(x)] * 2)
        axes = ("copy", "rows") if copies.ndim > 1 and copies.shape[1] % 4 == 0 else ("copy",)
        return jax.device_put(copies, NamedSharding(mesh, PartitionSpec(*axes)))

    both = jax.jit(jax.vmap(function))(*jax.tree.map(put, arrays))
    both = jax.tree.map(np.asarray, both)
    jax.tree.map(lambda x: np.testing.assert_allclose(x[0], x[1], atol=1e-6), both)
    return jax.tree.map(lambda x: x[0], both)


@pytest.fixture(params=["plain", "jit", "vmap on eight devices"])
def run(request):
    """Calls ``f(*arrays, **keywords)`` as it is, compiled, or compiled, vectorized and sharded."""

    def call(function, *arrays, **keywords):
        named = {name: value for name, value in keywords.items() if isinstance(value, np.ndarray)}
        static = {name: value for name, value in keywords.items() if name not in named}

        def bound(positional, by_name):
            return function(*positional, **by_name, **static)

        if request.param == "plain":
            return bound(arrays, named)
        return (
            jax.jit(bound)(arrays, named) if request.param == "jit" else spread_copies(bound, (arrays, named))
        )

    return call


def assert_turns(result, rows):
    """Compares a [4, 4] table with ragged expected rows; places without a turn must be 0."""
    expected = np.zeros((4, 4), np.float32)
    for i, row in enumerate(rows):
        expected[i, : len(row)] = row
    np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize(
    "function, groups, keywords, expected",
    [
        (al.rloo, PAIRS, {}, [1, -1, -0.75, 0.75]),
        (al.rloo, ONE, {}, [0.583333, -0.75, -0.416667, 0.583333]),
        (al.grpo, PAIRS, {}, [0.707106, -0.707106, -0.707105, 0.707105]),
        (al.grpo, ONE, {}, [0.848873, -1.091408, -0.606338, 0.848873]),
        (al.grpo, PAIRS, {"scale_by_std": False}, [0.5, -0.5, -0.375, 0.375]),
        (lambda returns, groups: al.reinforce(returns), ONE, {}, [0.4375, -0.5625, -0.3125, 0.4375]),
    ],
)
def test_base_advantages(run, function, groups, keywords, expected):
    np.testing.assert_allclose(run(function, RETURNS, groups, **keywords), expected, atol=1e-5)


def test_grpo_over_turn_rows(run):
    scores = np.broadcast_to(RETURNS[:, None], TURNS.shape)
    whole = [[1.022217] * 3, [-1.226660] * 2, [-0.664441] * 4, [1.022217] * 2]
    assert_turns(run(al.grpo_turn_rows, scores, TURNS, ONE), whole)
    penalized = scores - 0.1 * EXAMPLE["invalid"].astype(np.float32)
    expected = [[1.016717] * 3, [-1.134031, -1.349105], [-0.811418, *[-0.596344] * 3], [1.016717] * 2]
    assert_turns(run(al.grpo_turn_rows, penalized, TURNS, ONE), expected)


@pytest.mark.parametrize("rows", ["first", "mean"])
def test_one_row_per_trajectory_is_grpo(run, rows):
    scores = np.broadcast_to(RETURNS[:, None], TURNS.shape)
    expected = np.where(TURNS > 0, np.asarray(al.grpo(RETURNS, PAIRS))[:, None], 0)
    result = run(al.grpo_turn_rows, scores, TURNS, PAIRS, rows=rows)
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_gigpo(run):
    lengths = TURNS.sum(1).astype(int)
    turn_returns = np.zeros((4, 4), np.float32)
    for i, length in enumerate(lengths):
        turn_returns[i, :length] = RETURNS[i] * 0.95 ** np.arange(length - 1, -1, -1)
    expected = [
        [0.823289, 0.912500, 0.437500],
        [-1.079211, -1.037500],
        [-0.614867, -0.574583, -0.562708, -0.312500],
        [0.870789, 0.949792],
    ]
    anchors = EXAMPLE["anchor"].astype(np.int32)
    assert_turns(run(al.gigpo, RETURNS, turn_returns, anchors, TURNS, ONE), expected)


def test_reinforce_pp_baseline(run):
    last = np.array([np.flatnonzero(row)[-1] for row in TOKENS])
    rewards = np.zeros(TOKENS.shape, np.float32)
    rewards[np.arange(4), last] = RETURNS - RETURNS.mean()
    result = run(al.reinforce_pp, rewards, TOKENS)
    expected = np.array([1.056039, -1.290714, -0.704026, 1.056039])[:, None] * TOKENS
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_turn_entropies(run):
    entropies, mask = run(
        al.compute_turn_entropies, EXAMPLE["ent"], TOKENS, ROW, TURN_OF, num_trajectories=4, num_turns=4
    )
    np.testing.assert_array_equal(mask, TURNS > 0)
    np.testing.assert_allclose(entropies, np.where(TURNS > 0, H, 0), atol=1e-6)
    back = run(al.turns_to_tokens, np.asarray(entropies), TOKENS, ROW, TURN_OF)
    np.testing.assert_allclose(back[0], [0.9, 0.9, 0, 0.4, 0.4, 0.4, 0, 0.2, 0, 0, 0, 0], atol=1e-6)
    counts = run(al.count_turn_tokens, TOKENS, ROW, TURN_OF, num_trajectories=4, num_turns=4)
    np.testing.assert_array_equal(counts, EXAMPLE["n_tok"])


EMPG = [
    (
        {},
        [
            [0.325840, 0.559398, 0.591108],
            [-0.302173, -0.491847],
            [-0.396871, -0.340010, -0.490789, -0.360451],
            [0.553635, 0.352162],
        ],
    ),
    (
        {"zeta": 0.05},
        [
            [0.311049, 0.536407, 0.613358],
            [-0.307364, -0.469597],
            [-0.404947, -0.358696, -0.493368, -0.338201],
            [0.536946, 0.374412],
        ],
    ),
    (
        {"zeta": 0.0},
        [
            [0.296259, 0.513416, 0.635609],
            [-0.312554, -0.447346],
            [-0.413023, -0.377382, -0.495947, -0.315950],
            [0.520256, 0.396663],
        ],
    ),
    (
        {"k": 0.0},
        [
            [0.552308, 0.568710, 0.478226],
            [-0.466893, -0.521774],
            [-0.336121, -0.314901, -0.347115, -0.396774],
            [0.431106, 0.353226],
        ],
    ),
]


def test_empg_centered_by_tokens(run):
    expected = [
        [0.347537, 0.581096, 0.612805],
        [-0.280476, -0.470150],
        [-0.375174, -0.318312, -0.469092, -0.338754],
        [0.575333, 0.373859],
    ]
    counts = EXAMPLE["n_tok"].astype(np.int32)
    assert_turns(run(al.empg, BASE, H, TURNS, center="token", token_counts=counts), expected)


def test_empg_factors(run):
    ones = np.ones_like(BASE)
    expected = [
        [0.669492, 1.103805, 1.348191],
        [0.548133, 0.817719],
        [0.998764, 0.903719, 1.219893, 0.739903],
        [1.489981, 1.160399],
    ]
    assert_turns(run(al.empg, ones, H, TURNS, zeta=0.0, center="none"), expected)


def test_empg_bonus(run):
    """With no advantage, no scaling and no centring, ζ = 1 leaves f of the next turn."""
    expected = [[0.740818, 0.904837], [0.548812], [0.606531, 0.818731, 0.496585], [0.778801]]
    assert_turns(run(al.empg, 0 * BASE, H, TURNS, zeta=1.0, center="none"), expected)


@pytest.mark.parametrize("keywords, expected", EMPG, ids=["full", "zeta", "scaling", "bonus"])
def test_empg(run, keywords, expected):
    assert_turns(run(al.empg, BASE, H, TURNS, **keywords), expected)


AEM = {
    "group": [
        [0.358725, 0.625225, 0.780812],
        [-0.287245, -0.447993],
        [-0.328046, -0.284376, -0.436534, -0.213702],
        [0.580902, 0.406441],
    ],
    "batch": [
        [0.334746, 0.551903, 0.674095],
        [-0.274067, -0.408860],
        [-0.374537, -0.338895, -0.457460, -0.277464],
        [0.558743, 0.435149],
    ],
    "trajectory": [
        [0.260371, 0.531867, 0.707762],
        [-0.268941, -0.731059],
        [-0.388665, -0.318212, -0.579820, -0.213304],
        [0.548294, 0.201706],
    ],
}


@pytest.mark.parametrize("scope", AEM)
def test_aem(run, scope):
    assert_turns(run(al.aem, BASE, H, TURNS, group_ids=PAIRS, scope=scope), AEM[scope])


def test_aem_factors(run):
    ones = np.ones_like(BASE)
    expected = [
        [0.717450, 1.250450, 1.561623],
        [0.574489, 0.895987],
        [0.874789, 0.758335, 1.164092, 0.569871],
        [1.549071, 1.083842],
    ]
    assert_turns(run(al.aem, ones, H, TURNS, group_ids=PAIRS), expected)


def test_aem_dead_zone(run):
    close = (0.5 + 0.01 * np.arange(16, dtype=np.float32).reshape(4, 4) % 0.04).astype(np.float32)
    np.testing.assert_array_equal(
        run(al.aem, BASE, close, TURNS, group_ids=PAIRS), np.where(TURNS > 0, BASE, 0)
    )


NEW, OLD, REF, ROLL = (EXAMPLE[name].astype(np.float32) for name in ("new", "old", "ref", "roll"))
SEQUENCES = np.where(TOKENS > 0, ROW * 7 + 3, -1).astype(np.int32)
TURN_SEQUENCES = np.where(TOKENS > 0, ROW * 4 + TURN_OF, -1).astype(np.int32)


def empg_tokens():
    """The EMPG advantages of the worked example, per token."""
    return np.asarray(al.turns_to_tokens(al.empg(BASE, H, TURNS), TOKENS, ROW, TURN_OF))


@pytest.mark.parametrize(
    "keywords, weights, expected",
    [
        ({}, {"mode": "token-mean"}, 0.05859536),
        ({}, {"mode": "seq-mean-token-mean"}, 0.00807984),
        ({}, {"mode": "seq-mean-token-sum"}, 0.29297681),
        ({}, {"mode": "seq-mean-token-sum-norm", "scale": 16}, 0.07324420),
        ({"clip_high": 0.28}, {"mode": "token-mean"}, 0.05399334),
        ({"dual_clip": None}, {"mode": "token-mean"}, 0.07187660),
    ],
)
def test_ppo_clip(run, keywords, weights, expected):
    loss = run(al.ppo_clip, NEW, OLD, empg_tokens(), **keywords)
    np.testing.assert_allclose(jnp.sum(loss * run(al.loss_weights, TOKENS, **weights)), expected, atol=1e-6)


def token_mean(loss, mode="token-mean"):
    return jnp.sum(loss * al.loss_weights(TOKENS, mode=mode))


def test_gspo(run):
    loss = run(al.gspo, NEW, OLD, empg_tokens(), SEQUENCES)
    np.testing.assert_allclose(token_mean(loss, "seq-mean-token-mean"), 0.01578008, atol=1e-6)
    ratios = run(al.gspo, NEW, OLD, -np.ones_like(NEW), SEQUENCES, clip_low=1.0, clip_high=10.0)
    np.testing.assert_allclose(ratios[:, 0], [1.065382, 0.784010, 1.151713, 0.852144], atol=1e-5)


def test_turn_ratio(run):
    loss = run(al.turn_ratio_clip, NEW, OLD, empg_tokens(), TURN_SEQUENCES)
    np.testing.assert_allclose(token_mean(loss), 0.04121127, atol=1e-6)


def test_unclipped_objectives(run):
    advantages = empg_tokens()
    loss = run(al.cispo, NEW, OLD, advantages)
    np.testing.assert_allclose(token_mean(loss), 0.02723244, atol=1e-6)
    loss = run(al.sapo, NEW, OLD, advantages)
    np.testing.assert_allclose(token_mean(loss, "seq-mean-token-mean"), -0.04728013, atol=1e-6)
    loss = run(al.reinforce_loss, NEW, advantages)
    np.testing.assert_allclose(token_mean(loss, "seq-mean-token-sum"), 0.06136988, atol=1e-6)


@pytest.mark.parametrize("mode, expected", [("mask", 0.07424985), ("clamp", 0.11363663)])
def test_decoupled_ppo(run, mode, expected):
    loss = run(al.decoupled_ppo, NEW, OLD, ROLL, empg_tokens(), cap=2.0, mode=mode)
    np.testing.assert_allclose(token_mean(loss), expected, atol=1e-6)


def test_corrections(run):
    loss = al.ppo_clip(NEW, OLD, empg_tokens()) * run(al.tis_weights, OLD, ROLL, TOKENS)
    np.testing.assert_allclose(token_mean(loss), 0.09674697, atol=1e-6)
    assert int(run(al.mis_mask, OLD, ROLL, TOKENS).sum()) == 19
    kept = run(al.offpolicy_sequence_mask, NEW, OLD, empg_tokens(), TOKENS, SEQUENCES)
    np.testing.assert_array_equal(kept, (TOKENS > 0) & (ROW != 1))


def test_theory(run):
    logits = np.float32([1.2, -0.3, 0.4, 2])
    np.testing.assert_allclose(run(al.score_norm_sq, logits), 0.591645, atol=1e-6)
    np.testing.assert_allclose(1 - jnp.exp(-run(al.renyi2_entropy, logits)), 0.591645, atol=1e-6)
    policy = np.log(np.float32([0.6, 0.3, 0.1]))
    for action, expected in ((2, 1.404639), (0, -0.387120)):
        np.testing.assert_allclose(run(al.entropy_drift, policy, action, 1.0), expected, atol=1e-6)


@pytest.mark.parametrize("kind, expected", [("k1", 0.02065763), ("k2", 0.07236932), ("k3", 0.06499261)])
def test_kl(run, kind, expected):
    weights = run(al.loss_weights, TOKENS, mode="token-mean")
    np.testing.assert_allclose(
        jnp.sum(run(al.kl_penalty, NEW, REF, kind=kind) * weights), expected, atol=1e-6
    )


def test_ppo_clip_gradient(run):
    advantages, weights = empg_tokens(), al.loss_weights(TOKENS, mode="token-mean")

    def total(logprobs):
        return jnp.sum(al.ppo_clip(logprobs, OLD, advantages) * weights)

    gradient = run(jax.grad(total), NEW)[1]
    np.testing.assert_allclose(gradient[np.flatnonzero(TOKENS[1])], [0, 0.02339299, 0.02054127], atol=1e-6)
