"""The methods that credit steps against plain loops, and their invariances: one program for all of them."""

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from empg_jax import algorithms as al

from . import step_oracles

N, K = 8, 5
quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**31 - 1)


def draw(seed):
    """Random attempts: some absent, some turns missing (also inside), few states, so that many meet."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, rng.integers(1, 4), N).astype(np.int32)
    groups[rng.random(N) < 0.2] = -1
    returns = rng.choice(np.float32([0, 0.5, 1.0]), N)
    return {
        "groups": groups,
        "mask": rng.random((N, K)) < rng.choice([0.5, 0.9, 1.0]),
        "success": rng.random(N) < rng.choice([0.0, 0.3, 0.7]),
        "returns": returns,
        "anchors": rng.choice(np.int32([-1, 0, 0, 5, 7, 2**31 - 1]), (N, K)),
        "actions": rng.choice(np.int32([-1, 0, 3, 2**31 - 1]), (N, K)),
        "last": rng.choice(np.int32([-1, 0, 5, 11, 2**31 - 1]), N),
        "milestones": rng.random((N, K)) < 0.3,
        "turn_returns": rng.normal(size=(N, K)).astype(np.float32),
        "rewards": rng.normal(size=(N, K)).astype(np.float32),
    }


def soil(data, seed):
    """Junk wherever no turn is."""
    rng = np.random.default_rng(seed)
    off = ~(data["mask"] & (data["groups"] >= 0)[:, None])
    dirty = dict(data)
    for name in ("turn_returns", "rewards"):
        dirty[name] = np.where(off, rng.choice(np.float32([np.nan, np.inf])), data[name])
    for name in ("anchors", "actions"):
        dirty[name] = np.where(off, rng.integers(0, 9, (N, K), np.int32), data[name])
    dirty["milestones"] = data["milestones"] | off
    dirty["last"] = np.where(data["success"] | (data["groups"] < 0), np.int32(7), data["last"])
    dirty["returns"] = np.where(data["groups"] < 0, np.float32(np.nan), data["returns"])
    return dirty


@jax.jit
def compute(data):
    groups = data["groups"]
    place = (data["anchors"], data["mask"], groups)
    acts = (data["anchors"], data["actions"], data["mask"], groups)
    won, end = data["success"], {"fail_node": "observation", "last_anchor_ids": data["last"]}
    return {
        "crbc": al.crbc(data["returns"], won, *acts),
        "graph_hca": al.graph_hca(data["returns"], won, *place),
        "graft": al.graft(won, *acts),
        "graft, lambda": al.graft(won, *acts, gamma=0.9, lam=0.8),
        "graph_gpo": al.graph_gpo(data["returns"], won, *place),
        "graph_gpo, ends": al.graph_gpo(data["returns"], won, *place, **end),
        "hgpo": al.hgpo(data["turn_returns"], *place),
        "gagpo": al.gagpo(data["rewards"], *place),
        "beacon": al.beacon(data["returns"], data["milestones"], data["mask"], groups),
    }


def computed(data):
    return {name: np.asarray(value) for name, value in compute(data).items()}


def assert_same(found, expected, where=slice(None), atol=2e-4):
    for name, value in found.items():
        np.testing.assert_allclose(value[where], expected[name][where], atol=atol, err_msg=name)


# Divided by the spread of a state's moves, float32's rounding counts where values are small.
LOOSE = {"graft": 2e-2, "graft, lambda": 2e-2, "graph_hca": 5e-3}


@quick
@given(seed=seeds)
def test_all_equal_a_loop(seed):
    data = draw(seed)
    found = computed(soil(data, seed))
    off = ~(data["mask"] & (data["groups"] >= 0)[:, None])
    for name, value in found.items():
        options = {"gamma": 0.9, "lam": 0.8} if "lambda" in name else {}
        options |= {"last": data["last"]} if "ends" in name else {}
        expected = step_oracles.ORACLES[name.partition(",")[0]](data, **options)
        np.testing.assert_allclose(value, expected, atol=LOOSE.get(name, 2e-4), err_msg=name)
        assert not value[off].any(), name


@quick
@given(seed=seeds)
def test_the_order_of_rows_and_the_names_of_groups_change_nothing(seed):
    data, rng = draw(seed), np.random.default_rng(seed)
    order, names = rng.permutation(N), rng.permutation(N).astype(np.int32)
    moved = {name: value[order] for name, value in data.items()}
    moved["groups"] = np.where(moved["groups"] >= 0, names[moved["groups"]], -1).astype(np.int32)
    plain = computed(data)
    assert_same(computed(moved), {name: value[order] for name, value in plain.items()}, atol=2e-3)


@quick
@given(seed=seeds)
def test_a_group_does_not_see_the_others(seed):
    data, other = draw(seed), draw(seed + 1)
    mine = data["groups"] == 0
    mixed = {
        name: np.where(mine.reshape(-1, *[1] * (value.ndim - 1)), value, other[name])
        for name, value in data.items()
    }
    mixed["groups"] = np.where(mine, 0, np.where(data["groups"] < 0, -1, data["groups"])).astype(np.int32)
    assert_same(computed(mixed), computed(data), mine, atol=2e-3)


def test_more_padding_changes_nothing():
    for seed in range(5):
        data = draw(seed)
        wide = {}
        for name, value in data.items():
            fill = -1 if name in ("groups", "anchors", "actions", "last") else 0
            wide[name] = np.pad(value, ((0, 3), (0, 2))[: value.ndim], constant_values=fill)
        found = {name: value[:N, :K] for name, value in computed(wide).items()}
        assert_same(found, computed(data), atol=2e-3)


def test_nothing_flows_back():
    data = draw(3)
    data["groups"][:] = 0

    def total(returns, rewards):
        place = (data["anchors"], data["mask"], data["groups"])
        credit = al.beacon(returns, data["milestones"], *place[1:]) + al.gagpo(rewards, *place)
        return (credit + al.hgpo(rewards, *place)).sum()

    for gradient in jax.jit(jax.grad(total, (0, 1)))(data["returns"], data["rewards"]):
        assert not np.asarray(gradient).any()


def test_no_table_of_pairs_is_built():
    """No array of the program is larger than a few tables, however large the batch."""
    size, turns = 256, 50
    shapes = {
        name: jax.ShapeDtypeStruct((size, turns)[: value.ndim], value.dtype)
        for name, value in draw(0).items()
    }
    text = jax.make_jaxpr(compute)(shapes).pretty_print()
    largest = max(
        int(np.prod([int(n) for n in part.split("]")[0].split(",")]))
        for part in text.split("[")[1:]
        if part.split("]")[0].replace(",", "").isdigit()
    )
    assert size * turns <= largest <= 2 * size * (turns + 1)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda d, p: al.hgpo(d["rewards"], *p, history=-1), "history=-1 must be at least 0"),
        (lambda d, p: al.gagpo(d["rewards"], *p, normalize="batch"), "normalize='batch'.*'group', 'none'"),
        (lambda d, p: al.igpo(d["rewards"], d["returns"], *p[1:]), r"answer_logprobs \(8, 5\) must have"),
        (lambda d, p: al.information_gains(d["rewards"], p[1], kind="odds"), "kind='odds'"),
        (lambda d, p: al.turn_ratio_clip(*[d["rewards"]] * 3, d["anchors"], ratio="sum"), "ratio='sum'"),
        (lambda d, p: al.kl_penalty(*[d["rewards"]] * 2, kind="k3_is"), "k3_is needs old_logprobs"),
        (
            lambda d, p: al.kl_penalty(*[d["rewards"]] * 2, kind="k3", old_logprobs=d["rewards"]),
            "no other kind does",
        ),
        (lambda d, p: al.graph_gpo(d["returns"], d["success"], *p, fail_node="loop"), "'absorbing', 'obs"),
        (
            lambda d, p: al.graph_gpo(d["returns"], d["success"], *p, fail_node="observation"),
            "needs last_anchor_ids",
        ),
        (lambda d, p: al.parts.entropy_ratio(low=1.1, high=1.05), "entropy_low=1.1 must be below"),
    ],
)
def test_refused(call, says):
    data = draw(0)
    with pytest.raises(ValueError, match=says):
        call(data, (data["anchors"], data["mask"], data["groups"]))


def test_shapes_are_refused():
    data = draw(0)
    place = (data["anchors"], data["mask"], data["groups"])
    with pytest.raises((ValueError, TypeError)):
        al.graft(data["success"], data["anchors"], data["actions"][:, :2], *place[1:])
    with pytest.raises((ValueError, TypeError)):
        al.graph_gpo(data["returns"], data["success"][:3], *place)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "decay"), [(3, 0.1), (8, 0.1), (10, 0.1), (11, 0.2), (40, 0.5), (60, 0.1)]
)
def test_graph_gpo_far_from_the_goal(length, decay):
    """A corridor to WIN, and an attempt that loses at its first step: worths are tiny there, and differ."""
    mask = np.zeros((2, length), bool)
    mask[0], mask[1, 0] = True, True
    data = {"groups": np.zeros(2, np.int32), "mask": mask, "success": np.array([True, False])}
    data |= {"returns": np.float32([1, 0]), "anchors": np.tile(np.arange(length, dtype=np.int32), (2, 1))}
    place = (data["success"], data["anchors"], mask, data["groups"])
    found = jax.jit(partial(al.graph_gpo, decay=decay))(data["returns"], *place)
    np.testing.assert_allclose(found, step_oracles.graph_gpo(data, decay=decay), rtol=1e-4, atol=1e-5)
