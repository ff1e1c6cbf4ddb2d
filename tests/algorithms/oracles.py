"""Plain Python loops in float64 that the vectorized functions are compared with."""

import numpy as np


def modulation(base, entropies, mask, segments, *, k, k_future=1.0, zeta=0.0, center=False, min_range=0.0):
    """EMPG (with the given scope) and, with zeta = 0 and no centring, AEM."""
    turns = [
        (i, t) for i in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[i, t] and segments[i] >= 0
    ]
    result, certainty = np.zeros(mask.shape), np.zeros(mask.shape)
    for segment in {segments[i] for i, _ in turns}:
        members = [(i, t) for i, t in turns if segments[i] == segment]
        values = np.array([entropies[i, t] for i, t in members], np.float64)
        span = values.max() - values.min()
        normal = (values - values.min()) / span if span > 0 else 0 * values
        factor = np.exp(-k * normal) / np.mean(np.exp(-k * normal))
        if span < min_range:
            factor = np.ones_like(factor)
        for (i, t), g, hn in zip(members, factor, normal, strict=True):
            result[i, t], certainty[i, t] = base[i, t] * g, np.exp(-k_future * hn)
    for i, t in turns:
        later = [s for j, s in turns if j == i and s > t]
        if later:
            result[i, t] += zeta * certainty[i, min(later)]
    if center and turns:
        mean = np.mean([result[i, t] for i, t in turns])
        for i, t in turns:
            result[i, t] -= mean
    return result


def group_advantages(returns, groups, kind):
    """``mean``, ``std`` (ddof 1, eps 1e-6) or ``rloo``; a group of one gives 0."""
    result = np.zeros(len(returns))
    for i, group in enumerate(groups):
        members = np.array([r for r, g in zip(returns, groups, strict=True) if g == group], np.float64)
        if group < 0 or len(members) == 1:
            continue
        if kind == "rloo":
            others = (members.sum() - returns[i]) / (len(members) - 1)
            result[i] = returns[i] - others
        else:
            result[i] = returns[i] - members.mean()
            if kind == "std":
                result[i] /= members.std(ddof=1) + 1e-6
    return result


def anchor_advantages(turn_returns, anchors, mask, groups):
    """GiGPO's step part, mean only."""
    result = np.zeros(mask.shape)
    turns = [(i, t) for i, t in zip(*np.nonzero(mask), strict=True) if groups[i] >= 0 and anchors[i, t] >= 0]
    for i, t in turns:
        same = [
            turn_returns[j, s] for j, s in turns if (groups[j], anchors[j, s]) == (groups[i], anchors[i, t])
        ]
        result[i, t] = turn_returns[i, t] - np.mean(same)
    return result


def weights(mask, mode, ids):
    """`loss_weights` by counting."""
    result = np.zeros(mask.shape)
    tokens = [place for place in zip(*np.nonzero(mask), strict=True) if ids[place] >= 0]
    lengths = {}
    for place in tokens:
        lengths[ids[place]] = lengths.get(ids[place], 0) + 1
    for place in tokens:
        n = lengths[ids[place]]
        result[place] = {
            "token-mean": 1 / len(tokens),
            "seq-mean-token-mean": 1 / (n * len(lengths)),
            "seq-mean-token-sum": 1 / len(lengths),
            "seq-mean-token-sum-norm": 1 / mask.shape[1],
        }[mode]
    return result


def gae(rewards, values, mask, gamma, lam):
    """Backward recursion over the valid tokens of each row."""
    advantages = np.zeros(mask.shape)
    for row in range(mask.shape[0]):
        next_value = next_advantage = 0.0
        for j in np.flatnonzero(mask[row])[::-1]:
            delta = rewards[row, j] + gamma * next_value - values[row, j]
            next_advantage = advantages[row, j] = delta + gamma * lam * next_advantage
            next_value = values[row, j]
    return advantages
