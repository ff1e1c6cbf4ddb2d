"""The methods that credit steps as plain loops in float64; values of the state graph by a linear solve."""

import collections

import numpy as np

from . import oracles

NOISE = 1e-6


def turns_of(mask, groups):
    """The turns that exist, trajectory by trajectory."""
    return [(i, t) for i, t in np.argwhere(mask) if groups[i] >= 0]


def edges_of(success, anchors, mask, groups, last=None):
    """``{turn: (node, next node)}``; a node is (task, anchor), the last ones are WIN and LOSE.

    With ``last`` a failure ends in the anchor that stands there, if it is known.
    """
    edges = {}
    for i, t in turns_of(mask, groups):
        later = np.flatnonzero(mask[i, t + 1 :])
        if len(later):
            following = anchors[i, t + 1 + later[0]]
            end = (groups[i], following) if following >= 0 else None
        else:
            end = "WIN" if success[i] else "LOSE"
            if last is not None and not success[i] and last[i] >= 0:
                end = (groups[i], last[i])
        if anchors[i, t] >= 0 and end is not None:
            edges[i, t] = ((groups[i], anchors[i, t]), end)
    return edges


def solve(edges, beta, rewards=None, weights=None):
    """``V(s) = mean over the edges out of s of r + beta V(dst)``, as a linear system.

    WIN is worth 1, with rewards 0.

    Args:
      edges: as above.
      beta: the discount.
      rewards: r of every edge; None = 0.
      weights: the edges that count; None = all.
    """
    counted = list(edges) if weights is None else list(weights)
    nodes = {node: n for n, node in enumerate(dict.fromkeys(src for src, _ in edges.values()))}
    system, right = np.eye(len(nodes)), np.zeros(len(nodes))
    size = collections.Counter(edges[turn][0] for turn in counted)
    for turn in counted:
        src, dst = edges[turn]
        right[nodes[src]] += (rewards[turn] if rewards else beta * (dst == "WIN")) / size[src]
        if dst in nodes:
            system[nodes[src], nodes[dst]] -= beta / size[src]
    found = np.linalg.solve(system, right) if nodes else right
    ends = {"WIN": 0.0 if rewards else 1.0, "LOSE": 0.0}
    return collections.defaultdict(float, {node: found[n] for node, n in nodes.items()} | ends)


def among(edges):
    """The turns of every node."""
    members = collections.defaultdict(list)
    for turn, (src, _) in edges.items():
        members[src].append(turn)
    return members.values()


def quiet(values, noise=NOISE):
    return {turn: 0.0 if abs(value) <= noise else value for turn, value in values.items()}


def crbc(data, beta=0.98, weight=5.0, min_std=0.1):
    edges = edges_of(data["success"], data["anchors"], data["mask"], data["groups"])
    value, actions, step = solve(edges, beta), data["actions"], np.zeros(data["mask"].shape)
    for turns in among(edges):
        known = [turn for turn in turns if actions[turn] >= 0]
        gain = {}
        for turn in known:
            same = [beta * value[edges[other][1]] for other in known if actions[other] == actions[turn]]
            gain[turn] = np.mean(same) - value[edges[turn][0]]
        gain = quiet(gain)
        spread = np.sqrt(sum(g**2 for g in gain.values()) / len(turns))
        for turn in known:
            if len({actions[other] for other in known}) >= 2:
                step[turn] = gain[turn] / max(spread, min_std)
    return weight * step + episodes(data)


def graph_hca(data, gamma=0.95, floor=1e-2):
    edges = edges_of(data["success"], data["anchors"], data["mask"], data["groups"])
    value, step = solve(edges, gamma), np.zeros(data["mask"].shape)
    for turns in among(edges):
        moved = [np.log(max(value[edges[t][1]], floor) / max(value[edges[t][0]], floor)) for t in turns]
        if np.std(moved) > 1e-5:
            for turn, gain in zip(turns, moved, strict=True):
                step[turn] = (gain - np.mean(moved)) / np.std(moved)
    return step + episodes(data)


def graft(data, gamma=0.99, lam=0.0):
    edges = edges_of(data["success"], data["anchors"], data["mask"], data["groups"])
    value, step = solve(edges, gamma), np.zeros(data["mask"].shape)
    td = quiet({turn: gamma * value[dst] - value[src] for turn, (src, dst) in edges.items()})
    distinct = {(*edges[turn], data["actions"][turn]): turn for turn in reversed(list(edges))}.values()
    sums = solve(edges, gamma * lam, td, list(distinct))
    found = quiet({turn: td[turn] + gamma * lam * sums[dst] for turn, (_, dst) in edges.items()})
    for turns in among(edges):
        values = np.array([found[turn] for turn in turns])
        mean, std = (0.0, abs(values[0])) if len(turns) == 1 else (values.mean(), values.std())
        for turn in turns:
            gain = found[turn] - mean
            step[turn] = 0.0 if abs(gain) <= NOISE else gain / (std + 1e-6)
    return step


def graph_gpo(data, decay=0.1, last=None):
    edges = edges_of(data["success"], data["anchors"], data["mask"], data["groups"], last)
    away = collections.defaultdict(lambda: np.inf, {"WIN": 0})
    for _ in edges:
        for src, dst in edges.values():
            away[src] = min(away[src], 1 + away[dst])
    step = np.zeros(data["mask"].shape)
    for turns in among(edges):
        group = edges[turns[0]][0][0]
        finite = [away[s] for s, _ in edges.values() if s[0] == group and away[s] < np.inf]
        most = max(finite, default=0) + 1
        worth = np.array([10 * decay ** min(away[edges[turn][1]], most) for turn in turns])
        if len(turns) > 1:
            for turn, gain in zip(turns, worth - worth.mean(), strict=True):
                step[turn] = gain / (worth.std(ddof=1) + 1e-6)
    return step + episodes(data)


def episodes(data, kind="std"):
    found = oracles.group_advantages(np.nan_to_num(data["returns"]), data["groups"], kind)
    return found[:, None] * (data["mask"] & (data["groups"] >= 0)[:, None])


def hgpo(data, history=2):
    turns = turns_of(data["mask"], data["groups"])
    anchors, values = data["anchors"], data["turn_returns"]
    total, weights = np.zeros(data["mask"].shape), np.zeros(data["mask"].shape)
    for level in range(history + 1):
        members = collections.defaultdict(list)
        for i, t in turns:
            places = range(t - level, t + 1)
            if t >= level and all(data["mask"][i, s] and anchors[i, s] >= 0 for s in places):
                members[groups_key(data, i), tuple(anchors[i, s] for s in places)].append((i, t))
        for same in members.values():
            found = np.array([values[turn] for turn in same], np.float64)
            for turn, gain in zip(same, found - found.mean(), strict=True):
                gain = gain / (found.std() + 1e-6) if len(same) > 1 else 0.0
                if gain != 0:
                    total[turn] += (level + 2) * gain
                    weights[turn] += level + 2
    return total / (weights + 1e-6)


def groups_key(data, i):
    return int(data["groups"][i])


def backwards(data, rewards, decay):
    """Discounted sums of a table along each trajectory."""
    found = np.zeros(data["mask"].shape)
    for i in range(len(found)):
        later = 0.0
        for t in np.flatnonzero(data["mask"][i])[::-1]:
            later = found[i, t] = rewards[i, t] + decay * later
    return found


def gagpo(data, gamma=0.95, lam=0.8):
    turns, rewards = turns_of(data["mask"], data["groups"]), np.where(data["mask"], data["rewards"], 0)
    later, deltas = backwards(data, rewards, gamma), np.zeros(rewards.shape)
    visits = collections.defaultdict(list)
    for i, t in turns:
        anchor = data["anchors"][i, t]
        visits[data["groups"][i], anchor if anchor >= 0 else (i, t)].append((i, t))
    value = {turn: np.mean([later[other] for other in same]) for same in visits.values() for turn in same}
    for i, t in turns:
        after = [s for j, s in turns if j == i and s > t]
        deltas[i, t] = rewards[i, t] + gamma * (value[i, min(after)] if after else 0.0) - value[i, t]
    found = backwards(data, deltas, gamma * lam)
    found[np.abs(found) <= NOISE] = 0
    result = np.zeros(found.shape)
    for i, t in turns:
        same = np.array([found[j, s] for j, s in turns if data["groups"][j] == data["groups"][i]])
        if len(same) > 1:
            result[i, t] = (found[i, t] - same.mean()) / (same.std(ddof=1) + 1e-6)
    return result


def beacon(data, gamma=0.95, scale=10.0):
    turns, worth, result = turns_of(data["mask"], data["groups"]), {}, episodes(data, "mean")
    segments = collections.defaultdict(list)
    for i, t in turns:
        steps = [s for j, s in turns if j == i]
        reached = [s for s in steps if data["milestones"][i, s]]
        ahead = [s for s in reached if s >= t]
        worth[i, t] = scale * gamma ** (steps.index(ahead[0]) - steps.index(t)) if ahead else 0.0
        segments[data["groups"][i], len(reached) - len(ahead)].append((i, t))
    for same in segments.values():
        for turn in same:
            result[turn] += worth[turn] - np.mean([worth[other] for other in same])
    return result


def igpo(data):
    """Information gain, at the last turn the outcome, normalized together in the task, summed backwards."""
    turns, worth, result = turns_of(data["mask"], data["groups"]), {}, np.zeros(data["mask"].shape)
    for i, t in turns:
        is_last = not data["mask"][i, t + 1 :].any()
        odds = np.exp(np.float64(data["answers"][i]))
        worth[i, t] = data["returns"][i] if is_last else odds[t + 1] - odds[t]
    for i, t in turns:
        same = np.array([worth[j, s] for j, s in turns if data["groups"][j] == data["groups"][i]])
        scale = np.sqrt(same.var() + 1e-8) + 1e-6 if len(same) > 1 else 1.0
        result[i, t] = (worth[i, t] - same.mean()) / scale
    return np.where(data["mask"], result[:, ::-1].cumsum(1)[:, ::-1], 0)


def outcome_of(data, i):
    """Its return, normalized among the attempts at the task."""
    present = np.array([data["returns"][j] for j in np.flatnonzero(data["groups"] == data["groups"][i])])
    scale = np.sqrt(present.var() + 1e-8) + 1e-6 if len(present) > 1 else 1.0
    return (data["returns"][i] - present.mean()) / scale


def a2tgpo_gains(data):
    """Each turn's gain but the last's, normalized among the task's turns of equal index; NaN at others."""
    gains, found = np.full(data["mask"].shape, np.nan), np.full(data["mask"].shape, np.nan)
    for i, t in turns_of(data["mask"], data["groups"]):
        if data["mask"][i, t + 1 :].any():
            odds = np.exp(np.float64(data["answers"][i]))
            gains[i, t] = odds[t + 1] - odds[t]
    for i, t in np.argwhere(~np.isnan(gains)):
        same = gains[data["groups"] == data["groups"][i], t]
        same = same[~np.isnan(same)]
        scale = np.sqrt(same.var() + 1e-8) + 1e-6 if len(same) > 1 else 1.0
        found[i, t] = (gains[i, t] - same.mean()) / scale
    return found


def a2tgpo(data):
    """Information gain at equal depth: what is still to be gained, and the outcome."""
    found, result = a2tgpo_gains(data), np.zeros(data["mask"].shape)
    for i, t in turns_of(data["mask"], data["groups"]):
        ahead = found[i, t:][~np.isnan(found[i, t:])]
        result[i, t] = outcome_of(data, i) + (0.3 * ahead.sum() / np.sqrt(len(ahead)) if len(ahead) else 0.0)
    return result


ORACLES = {
    "igpo": igpo,
    "a2tgpo": a2tgpo,
    "crbc": crbc,
    "graph_hca": graph_hca,
    "graft": graft,
    "graph_gpo": graph_gpo,
    "hgpo": hgpo,
    "gagpo": gagpo,
    "beacon": beacon,
}
