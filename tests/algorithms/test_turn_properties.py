"""Information gain, turn-level GAE and entropy ratio clipping against plain loops: one program for all."""

import collections

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from empg_jax import algorithms as al
from tests.algorithms.test_step_properties import quick

N, K = 7, 4
seeds = st.integers(0, 2**31 - 1)


def draw(seed):
    """Random attempts: turns from the first column on, some rows absent or without a turn."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, rng.integers(1, 4), N).astype(np.int32)
    groups[rng.random(N) < 0.2] = -1
    return {
        "groups": groups,
        "mask": np.arange(K) < rng.integers(0, K + 1, N)[:, None],
        "levels": np.log(rng.uniform(0.05, 1, (N, K + 1))).astype(np.float32),
        "outcomes": rng.choice(np.float32([0, 0.5, 1]), N),
        "rewards": rng.normal(size=(N, K)).astype(np.float32),
        "values": rng.normal(size=(N, K)).astype(np.float32),
        "bootstrap": rng.choice(np.float32([0, 0.5]), N),
        "entropies": rng.gamma(1.0, 0.5, (2, N, K)).astype(np.float32),
    }


def soil(data, seed):
    """Junk wherever nothing may be read."""
    rng, dirty = np.random.default_rng(seed), dict(data)
    for name in ("rewards", "values"):
        dirty[name] = np.where(data["mask"], data[name], rng.choice(np.float32([np.nan, np.inf])))
    # After the last turn, and at it, no level is read.
    read = np.pad(data["mask"], ((0, 0), (0, 1)))
    dirty["levels"] = np.where(read, data["levels"], np.float32(np.nan))
    dirty["entropies"] = np.where(data["mask"], data["entropies"], np.float32(np.nan))
    dirty["outcomes"] = np.where(data["groups"] >= 0, data["outcomes"], np.float32(np.nan))
    return dirty


@jax.jit
def compute(data):
    mask, groups = data["mask"], data["groups"]
    gains = al.information_gains(data["levels"], mask)
    kinds = {"igpo": {}, "igpo, apart": {"normalize": "separate", "gamma": 0.9, "kind": "logprob"}}
    found = {
        name: al.igpo(data["levels"], data["outcomes"], mask, groups, **options)
        for name, options in kinds.items()
    }
    found["a2tgpo"], found["clip"] = al.a2tgpo(gains, data["outcomes"], mask, groups, gamma=0.9)
    found["gae"], found["targets"] = al.turn_gae(
        data["rewards"], data["values"], mask, bootstrap=data["bootstrap"]
    )
    found["kept"] = al.entropy_ratio_mask(*data["entropies"], mask)
    return found


def rows_of(data):
    """The rows that count, and their number of turns."""
    return [(i, int(data["mask"][i].sum())) for i in np.flatnonzero(data["groups"] >= 0)]


def standardized(values, keys):
    """Normalize a dict of numbers among equal keys, as the released code does."""
    members = collections.defaultdict(list)
    for place, value in values.items():
        members[keys[place]].append(value)
    found = {}
    for place, value in values.items():
        same = np.array(members[keys[place]])
        spread = np.sqrt(same.var() + 1e-8) + 1e-6 if len(same) > 1 else 1.0
        found[place] = (value - same.mean()) / spread
    return found


def gains_of(data, kind="prob"):
    levels = data["levels"].astype(np.float64)
    levels = np.exp(levels) if kind == "prob" else levels
    return {(i, t): levels[i, t + 1] - levels[i, t] for i, n in rows_of(data) for t in range(n - 1)}


def igpo(data, gamma=1.0, normalize="joint", kind="prob"):
    ends = {(i, n - 1): float(data["outcomes"][i]) for i, n in rows_of(data) if n}
    values = gains_of(data, kind) | ends
    keys = {p: (data["groups"][p[0]], normalize == "separate" and p in ends) for p in values}
    worth, result = standardized(values, keys), np.zeros((N, K))
    for i, n in rows_of(data):
        for t in reversed(range(n)):
            result[i, t] = worth[i, t] + (gamma * result[i, t + 1] if t + 1 < n else 0)
    return result


def a2tgpo(data, alpha=0.3, gamma=0.9):
    gains = gains_of(data)
    depth = standardized(gains, {place: (data["groups"][place[0]], place[1]) for place in gains})
    ends = {i: float(data["outcomes"][i]) for i, n in rows_of(data) if n}
    own = standardized(ends, {i: data["groups"][i] for i in ends})
    result, clip = np.zeros((N, K)), np.zeros((N, K))
    for i, n in rows_of(data):
        for t in range(n):
            later = sum(gamma ** (j - t) * depth[i, j] for j in range(t, n - 1))
            result[i, t] = own[i] + (alpha * later / np.sqrt(n - 1 - t) if t < n - 1 else 0)
            clip[i, t] = 1 + (0.3 * np.tanh(depth[i, t] / 2) if t < n - 1 else 0)
    return result, clip


def turn_gae(data, gamma=0.99, lam=0.9):
    found = np.zeros((N, K))
    for i in range(N):
        following, later = float(data["bootstrap"][i]), 0.0
        for t in reversed(range(data["mask"][i].sum())):
            value = float(data["values"][i, t])
            later = found[i, t] = data["rewards"][i, t] + gamma * following - value + gamma * lam * later
            following = value
    return found, np.where(data["mask"], found + data["values"], 0)


@quick
@given(seed=seeds)
def test_all_equal_a_loop(seed):
    data = draw(seed)
    found = {name: np.asarray(value) for name, value in compute(soil(data, seed)).items()}
    expected = {"igpo": igpo(data), "igpo, apart": igpo(data, 0.9, "separate", "logprob")}
    expected["a2tgpo"], expected["clip"] = a2tgpo(data)
    expected["gae"], expected["targets"] = turn_gae(data)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=2e-3, rtol=1e-3, err_msg=name)
    ratios = (data["entropies"][0] + 1e-8) / (data["entropies"][1] + 1e-8)
    clear = (np.abs(ratios - 0.95) > 1e-4) & (np.abs(ratios - 1.05) > 1e-4)
    kept = data["mask"] & (ratios > 0.95) & (ratios < 1.05)
    np.testing.assert_array_equal(found["kept"][clear], kept[clear])


@quick
@given(seed=seeds)
def test_the_order_of_rows_changes_nothing(seed):
    data, order = draw(seed), np.random.default_rng(seed).permutation(N)
    moved = {name: value[:, order] if name == "entropies" else value[order] for name, value in data.items()}
    plain, found = compute(data), compute(moved)
    for name, value in plain.items():
        np.testing.assert_allclose(found[name], np.asarray(value)[order], atol=2e-3, err_msg=name)
