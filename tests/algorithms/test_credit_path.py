"""Every named recipe from a YAML file through the batch builder and the composed algorithm to worked numbers.

The episodes hold all that a path can get wrong: invalid actions, rewards inside an episode, responses that
the token limit cut, episodes that broke a limit, in both context styles. The oracle is a loop over episodes.
"""

import jax
import numpy as np
import pytest

from empg_jax.algorithms import ALGORITHMS
from empg_jax.algorithms.recipes import RECIPES
from empg_jax.config import load_config
from empg_jax.learner.batching import BatchShape, make_batch
from empg_jax.run.assembly import (
    make_algorithm_from,
)
from empg_jax.types import Outcome, Scores, Status
from tests.episodes import Episodes

from . import oracles, step_oracles

PENALTY = 0.1
TURNS = 4
# group, rewards, valid, anchors, what is special. The first group is the worked example of the specification.
EPISODES = [
    (0, [0, 0, 1], [1, 1, 1], [0, 1, 2], ""),
    (0, [0, 0], [1, 0], [0, 1], ""),
    (0, [0, 0, 0, 0.25], [0, 1, 1, 1], [0, 3, 3, 4], ""),
    (0, [0, 1], [1, 1], [0, 3], ""),
    (1, [-0.5, 0, 1], [1, 1, 1], [5, 6, 7], "cut"),  # the token limit cut its second response
    (1, [0.3, 0, 0], [1, 0, 1], [5, 6, 6], "limit"),  # had gained 0.2 when it broke a limit
    (1, [0, 0, 0, 0], [0, 0, 0, 0], [5, 5, 5, 8], ""),  # fails honestly
    (1, [0, 0, 0, 0], [0, 0, 0, 0], [5, 5, 5, 8], "limit"),  # the same, and breaks a limit
]
GROUPS = np.array([episode[0] for episode in EPISODES])
MASK = np.array([[t < len(episode[1]) for t in range(TURNS)] for episode in EPISODES])


def table(column):
    values = np.zeros(MASK.shape)
    for i, episode in enumerate(EPISODES):
        values[i, : len(episode[column])] = episode[column]
    return values


REWARDS, VALID, ANCHORS = table(1), table(2) > 0, table(3).astype(int)
LIMIT = np.array([episode[4] == "limit" for episode in EPISODES])
SUCCESS = np.array([True, False, False, True, True, False, False, False])
LAST = np.array([9, 3, 4, -1, 8, 5, 6, -1])  # the observation that each episode ended in; -1 = unknown
ACTIONS = np.where(MASK, (np.arange(len(EPISODES))[:, None] // 2 + np.arange(TURNS)) % 2, -1)
ANSWERS = np.where(MASK, -0.3 * ((np.arange(len(EPISODES))[:, None] + 2 * np.arange(TURNS)) % 5 + 1), 0)
MILESTONES = MASK & ((np.arange(len(EPISODES))[:, None] + np.arange(TURNS)) % 3 == 1)


def make_trajectories(context):
    """The episodes as the rollout hands them over: raw rewards."""
    episodes, made = Episodes(), []
    for number, (group, rewards, valid, anchors, special) in enumerate(EPISODES):
        so_far, turns = np.zeros(0, np.int32), []
        for t, (reward, ok, anchor) in enumerate(zip(rewards, valid, anchors, strict=True)):
            is_growing = context == "transcript"
            prompt = np.concatenate([so_far, episodes.draw(2)]) if is_growing else episodes.draw(3)
            cut = "length" if special == "cut" and t == 1 else "stop"
            fields = dict(reward=float(reward), is_valid=bool(ok), anchor=anchor, finish_reason=cut)
            fields |= dict(action=f"go {ACTIONS[number, t]}", milestone=bool(MILESTONES[number, t]))
            fields["answer_logprob"] = float(ANSWERS[number, t])
            turns.append(episodes.turn(prompt, 1 + (number + t) % 2, **fields))
            so_far = np.concatenate([prompt, turns[-1].response_tokens])
        status = Status.SCORED_ZERO if special == "limit" else Status.TRAINED
        fields = dict(group_id=group, member=number % 4, episode_return=float(sum(rewards)))
        fields |= dict(outcome=Outcome(status, "x"), truncated=special in ("cut", "limit"))
        fields |= dict(is_success=bool(SUCCESS[number]))
        fields |= dict(last_anchor=None if LAST[number] < 0 else int(LAST[number]))
        made.append(episodes.trajectory(turns, **fields))
    return made


def run(tmp_path, algorithm, context="transcript", penalty=PENALTY, overrides=()):
    """A YAML file's algorithm on the episodes: batch, scores and credit."""
    path = tmp_path / "own.yaml"
    lines = [f"{key}: {value}" for key, value in algorithm.items()]
    path.write_text(
        f"env: {{context: {context}, max_turns: {TURNS}, invalid_penalty: {penalty}}}\n"
        "rollout: {tasks_per_update: 2, group_size: 4, max_tokens: 32, max_response_tokens: 4}\n"
        "train: {num_minibatches: 1, micro_tokens: 64}\n"
        "algorithm: {" + ", ".join(lines) + "}\n"
    )
    config = load_config(path, overrides)
    batch, _ = make_batch(make_trajectories(context), BatchShape(9, TURNS, 32, 2, 24, 1), seed=(0,))
    rng = np.random.default_rng(1)
    old = batch.behavior_logprobs
    noise = rng.normal(size=(2, *old.shape)).astype(np.float32)
    scores = Scores(old, batch.behavior_entropies, old + noise[0], noise[1])
    algorithm = make_algorithm_from(config)
    if algorithm.value_loss is None:
        scores = scores.replace(values=None)
    return batch, scores, algorithm.credit(batch, scores), config


# --------------------------------------------------------------------------------------------- the oracle


def settled(penalty):
    """Returns, the turns' rewards (what a broken limit takes back is off the last) and their penalties."""
    costs = penalty * (MASK & ~VALID)
    total = REWARDS.sum(1) - costs.sum(1)
    gained = np.where(LIMIT, np.maximum(total, 0), 0)
    rewards = REWARDS.copy()
    rewards[np.arange(len(EPISODES)), MASK.sum(1) - 1] -= gained
    return total - gained, rewards, costs


def tokens_of(batch, i):
    """The places of an episode's sampled tokens, turn by turn."""
    places = np.argwhere(batch.loss_mask & (batch.trajectory_ids == i))
    return sorted(map(tuple, places), key=lambda place: (batch.turn_ids[place], place))


def turn_estimates(name, penalty):
    """Base advantages of the recipes that give one number to a turn."""
    returns, rewards, costs = settled(penalty)
    if name in step_oracles.ORACLES:
        return step_oracles.ORACLES[name](step_data(penalty))
    scores = np.where(LIMIT[:, None], returns[:, None], REWARDS.sum(1)[:, None] - costs)
    if name == "reinforce":
        base = np.repeat((returns - returns.mean())[:, None], TURNS, 1)
    elif name == "grpo_turn_rows":
        base = np.zeros(MASK.shape)
        for i, t in np.argwhere(MASK):
            rows = scores[(GROUPS[i] == GROUPS)[:, None] & MASK]
            base[i, t] = (scores[i, t] - rows.mean()) / (rows.std(ddof=1) + 1e-6)
    elif name in ("gigpo", "sampo"):
        later = np.zeros(MASK.shape)
        for i in range(len(EPISODES)):
            for t in reversed(range(MASK[i].sum())):
                later[i, t] = rewards[i, t] + 0.95 * (later[i, t + 1] if t + 1 < TURNS else 0)
        base = oracles.anchor_advantages(later - costs, ANCHORS, MASK, GROUPS)
        means = np.array([scores[i][MASK[i]].mean() for i in range(len(EPISODES))])
        base += scores - np.array([means[group == GROUPS].mean() for group in GROUPS])[:, None]
    else:
        kind = {"rloo": "rloo", "dr_grpo": "mean"}.get(name, "std")
        base = np.repeat(oracles.group_advantages(returns, GROUPS, kind)[:, None], TURNS, 1)
    return base * MASK


def step_data(penalty):
    """The episodes as `step_oracles` takes them. A penalty lowers HGPO's own turn and GAGPO's reward."""
    returns, rewards, costs = settled(penalty)
    table = {"groups": GROUPS, "mask": MASK, "anchors": ANCHORS, "actions": ACTIONS, "success": SUCCESS}
    table |= {"returns": returns, "milestones": MILESTONES, "rewards": rewards - costs, "answers": ANSWERS}
    return table | {"turn_returns": step_oracles.backwards(table, rewards, 0.95) - costs}


def turn_ppo_estimates(penalty, batch, scores):
    """The turn as the action: one value before it, and all its tokens share advantage and target."""
    _, rewards, costs = settled(penalty)
    found, targets = np.zeros(batch.tokens.shape), np.zeros(batch.tokens.shape)
    for i in range(len(EPISODES)):
        later = following = 0.0
        for t in reversed(range(MASK[i].sum())):
            places = [place for place in tokens_of(batch, i) if batch.turn_ids[place] == t]
            value = scores.values[places[0]]
            later = (rewards - costs)[i, t] + 0.99 * following - value + 0.99 * 0.9 * later
            for place in places:
                found[place], targets[place] = later, later + value
            following = value
    return found, targets


def token_estimates(name, penalty, batch, scores):
    """The same for the recipes whose advantages differ inside a turn: tokens and critic's targets."""
    returns, rewards, costs = settled(penalty)
    found, targets = np.zeros(batch.tokens.shape), np.zeros(batch.tokens.shape)
    if name == "turn_ppo":
        found, targets = turn_ppo_estimates(penalty, batch, scores)
    for i in range(len(EPISODES)) if name != "turn_ppo" else ():
        later = following = 0.0
        places = tokens_of(batch, i)
        last = {batch.turn_ids[place]: place for place in places}
        for n, place in enumerate(places[::-1]):
            turn = batch.turn_ids[place]
            reward = (rewards - costs)[i, turn] if last[turn] == place else 0.0
            if name == "reinforce_pp":
                reward -= 0.001 * (scores.old_logprobs - scores.ref_logprobs)[place]
            if name == "reinforce_pp_baseline":  # the whole return counts at the end
                reward = returns[i] - returns[GROUPS[i] == GROUPS].mean() if n == 0 else 0.0
            value = scores.values[place] if name == "ppo" else 0.0
            later = found[place] = reward + following - value + later
            targets[place], following = later + value, value
    return found if name in WHITENED_LAST else whiten(found, batch.loss_mask), targets


WHITENED_LAST = ("ppo", "turn_ppo")  # after the modulation


def whiten(tokens, mask):
    found = np.array(tokens)
    found[mask] = (found[mask] - found[mask].mean()) / np.sqrt(found[mask].var(ddof=1) + 1e-8)
    return found


def turn_means(batch, tokens):
    return np.array(
        [
            [np.mean([tokens[p] for p in tokens_of(batch, i) if batch.turn_ids[p] == t]) if MASK[i, t] else 0
             for t in range(TURNS)]
            for i in range(len(EPISODES))
        ]
    )  # fmt: skip


def expect(name, penalty, batch, scores):
    base, _, kind = name.rpartition("_") if name not in RECIPES else (name, "", "")
    if base in ("reinforce_pp", "reinforce_pp_baseline", "ppo", "turn_ppo"):
        tokens, targets = token_estimates(base, penalty, batch, scores)
        estimated = turn_means(batch, tokens)
    else:
        estimated, targets = turn_estimates(base, penalty), None
    entropies = turn_means(batch, np.asarray(scores.entropies))
    advantages, factors = estimated, np.ones(MASK.shape)
    if kind:
        segments = np.zeros_like(GROUPS) if kind == "empg" else GROUPS
        spread = {} if kind == "empg" else dict(min_range=0.1)
        options = dict(zeta=0.1, center=True) if kind == "empg" else spread
        advantages = oracles.modulation(estimated, entropies, MASK, segments, k=1.0, **options)
        factors = oracles.modulation(factors, entropies, MASK, segments, k=1.0, **spread)
    learned = advantages
    if base in WHITENED_LAST:
        scaled, shift = np.zeros(batch.tokens.shape), advantages - estimated * factors
        for place in zip(*np.nonzero(batch.loss_mask), strict=True):
            where = batch.trajectory_ids[place], batch.turn_ids[place]
            scaled[place] = tokens[place] * factors[where] + shift[where]
        learned = turn_means(batch, whiten(scaled, batch.loss_mask))
    return estimated, advantages, targets, learned


# ---------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("context", ["transcript", "window"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_recipe_from_a_file_to_its_numbers(tmp_path, name, context):
    batch, scores, credit, _ = run(tmp_path, {"name": name}, context)
    base, advantages, targets, learned = expect(name, PENALTY, batch, scores)
    number = len(EPISODES)
    np.testing.assert_array_equal(np.asarray(credit.turns.mask)[:number], MASK)
    exact = name.removesuffix("_empg").removesuffix("_aem") not in ("graft", "graph_hca")
    atol = 5e-5 if exact else 1e-3  # divided by the spread of a state's moves: float32 against float64
    np.testing.assert_allclose(np.asarray(credit.turns.base)[:number], base, atol=2e-5 if exact else atol)
    np.testing.assert_allclose(np.asarray(credit.turns.advantages)[:number], learned, atol=atol)
    rebuilt = np.asarray(credit.turns.base * credit.turns.factors + credit.turns.bonuses)[:number]
    shift = (rebuilt - advantages)[MASK]
    np.testing.assert_allclose(shift, shift.mean(), atol=atol)  # centering alone is left
    means = turn_means(batch, np.asarray(credit.advantages))
    np.testing.assert_allclose(means, learned, atol=atol)
    assert not np.asarray(credit.advantages)[~batch.loss_mask].any()
    if targets is not None and name.startswith(("ppo", "turn_ppo")):
        np.testing.assert_allclose(np.asarray(credit.value_targets), targets, atol=2e-5)
    # Uniformity is judged before penalties: the second group differs in raw returns as well.
    assert credit.metrics["mixed_groups"] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"name": "grpo_empg", "correction": "{kind: tis, normalize: true}"},
        {"name": "ppo_aem"},
        {"name": "turn_ppo", "correction": "{kind: tis, normalize: true}"},
    ],
    ids=str,
)
def test_the_advantages_of_turns_are_those_of_the_loss(tmp_path, options):
    """After whitening and the division by the mean weight, in the table and in the metrics."""
    batch, scores, _, config = run(tmp_path, options)
    noise = np.random.default_rng(2).normal(size=batch.tokens.shape).astype(np.float32)
    credit = make_algorithm_from(config).credit(
        batch, scores.replace(old_logprobs=scores.old_logprobs + noise)
    )
    means = turn_means(batch, np.asarray(credit.advantages))
    np.testing.assert_allclose(np.asarray(credit.turns.advantages)[: len(EPISODES)], means, atol=1e-5)
    assert np.abs(np.asarray(credit.turns.base)[: len(EPISODES)] - means).max() > 0.05
    found = {name: float(credit.metrics[f"advantage_{name}"]) for name in ("mean", "abs_mean", "positive")}
    wanted = {"mean": means[MASK].mean(), "abs_mean": np.abs(means[MASK]).mean()}
    assert found == pytest.approx(wanted | {"positive": (means[MASK] > 0).mean()}, abs=1e-5)


@pytest.mark.parametrize("context", ["transcript", "window"])
def test_where_a_failure_ends_from_a_file_to_its_numbers(tmp_path, context):
    """GraphGPO's fail node: in what the episode saw last, if that is asked for."""
    bases = {}
    for node, last in (("absorbing", None), ("observation", LAST)):
        options = {"name": "graph_gpo", "graph": "{fail_node: " + node + "}"}
        _, _, credit, _ = run(tmp_path, options, context)
        bases[node] = np.asarray(credit.turns.base)[: len(EPISODES)]
        expected = step_oracles.graph_gpo(step_data(PENALTY), last=last)
        np.testing.assert_allclose(bases[node], expected, atol=2e-5)
    assert np.abs(bases["observation"] - bases["absorbing"]).max() > 0.1


def first_group(credit):
    return np.asarray(credit.turns.advantages)[:4]


def assert_rows(found, rows):
    for i, row in enumerate(rows):
        np.testing.assert_allclose(found[i, : len(row)], row, atol=3e-6)


@pytest.mark.parametrize("context", ["transcript", "window"])
def test_the_specifications_step_rows(tmp_path, context):
    """Its section 2.9 with the penalty at (1, 1) and (2, 0), from a configuration."""
    _, _, credit, _ = run(tmp_path, {"name": "grpo_turn_rows"}, context)
    expected = [[1.016717] * 3, [-1.134031, -1.349105], [-0.811418, *[-0.596344] * 3], [1.016717] * 2]
    assert_rows(first_group(credit), expected)


@pytest.mark.parametrize("preset", ["alfworld_verl", "webshop_verl"])
def test_the_presets_of_verl_agent_use_step_rows(preset):
    sizes = ["rollout.group_size=4", "rollout.tasks_per_update=2", "train.num_minibatches=1"]
    batch, _ = make_batch(make_trajectories("window"), BatchShape(8, TURNS, 32, 2, 24, 1), seed=(0,))
    scores = Scores(batch.behavior_logprobs, batch.behavior_entropies, batch.behavior_logprobs)
    credit = jax.jit(make_algorithm_from(load_config(preset, sizes)).credit)(batch, scores)
    expected = [[1.016717] * 3, [-1.134031, -1.349105], [-0.811418, *[-0.596344] * 3], [1.016717] * 2]
    assert_rows(first_group(credit), expected)


def test_mixed_groups_are_judged_on_raw_returns(tmp_path):
    """Four equal failures with 0 to 3 invalid actions are no mixed group, whatever their penalties."""
    episodes = Episodes()
    made = [
        episodes.trajectory(
            [episodes.turn(episodes.draw(2), 1, is_valid=t >= invalid) for t in range(3)],
            member=invalid,
            episode_return=0.0,
        )
        for invalid in range(4)
    ]
    batch, _ = make_batch(made, BatchShape(4, 3, 32, 2, 12, 1), seed=(0,))
    scores = Scores(batch.behavior_logprobs, batch.behavior_entropies, batch.behavior_logprobs)
    path = tmp_path / "own.yaml"
    path.write_text(
        "env: {invalid_penalty: 0.1}\nrollout: {group_size: 4, tasks_per_update: 1}\n"
        "train: {num_minibatches: 1}\n"
        "algorithm: {name: grpo, modulation: empg, empg: {mixed_groups_only: true}}\n"
    )
    credit = jax.jit(make_algorithm_from(load_config(path)).credit)(batch, scores)
    assert credit.metrics["mixed_groups"] == 0
    assert np.abs(credit.turns.base).max() > 0.5 and not np.asarray(credit.turns.advantages).any()


GIGPO = {
    ("trajectories", 0.0): [
        [0.823289, 0.912500, 0.437500],
        [-1.079211, -1.037500],
        [-0.614867, -0.574583, -0.562708, -0.312500],
        [0.870789, 0.949792],
    ],
    ("step_rows", 0.0): [
        [0.840335, 0.929545, 0.454545],
        [-1.062165, -1.020455],
        [-0.597822, -0.557538, -0.545663, -0.295455],
        [0.887835, 0.966837],
    ],
    ("step_rows", 0.1): [
        [0.883516, 0.997727, 0.472727],
        [-1.018984, -1.152273],
        [-0.754640, -0.539356, -0.527481, -0.277273],
        [0.931016, 0.985019],
    ],
}


@pytest.mark.parametrize("statistics, penalty", GIGPO)
def test_the_specifications_gigpo(tmp_path, statistics, penalty):
    options = {"name": "gigpo", "statistics": statistics}
    _, _, credit, _ = run(tmp_path, options, penalty=penalty)
    assert_rows(first_group(credit), GIGPO[statistics, penalty])


def test_a_penalty_does_not_reach_earlier_turns(tmp_path):
    """GiGPO's step part: the valid turn before an invalid one is worth the same with and without penalty."""
    parts = [
        np.asarray(run(tmp_path, {"name": "gigpo"}, penalty=penalty)[2].turns.base)
        - np.asarray(run(tmp_path, {"name": "gigpo", "omega": 0.0}, penalty=penalty)[2].turns.base)
        for penalty in (0.0, 0.1)
    ]
    # (1, 0) is valid and stands before (1, 1); its anchor's group has the penalty of (2, 0) in the mean only.
    np.testing.assert_allclose((parts[1] - parts[0])[1, 0], 0.1 / 4, atol=1e-6)
    np.testing.assert_allclose((parts[1] - parts[0])[2, 0], 0.1 / 4 - 0.1, atol=1e-6)


def test_breaking_a_limit_never_pays(tmp_path):
    """The same failure with and without a broken limit gets the same; a gain before a limit is taken back."""
    for name in ("grpo", "gigpo", "grpo_turn_rows", "reinforce_pp_baseline"):
        credit = run(tmp_path, {"name": name})[2]
        advantages = np.asarray(credit.turns.advantages)
        if name == "grpo":
            np.testing.assert_allclose(advantages[6], advantages[7], atol=1e-6)
        assert (advantages[7] <= advantages[6] + 0.05).all(), name
    returns, rewards, costs = settled(PENALTY)
    np.testing.assert_allclose(returns[5], 0, atol=1e-12)
    np.testing.assert_allclose((rewards - costs)[5, :3], [0.3, -0.1, -0.2])


def test_a_reward_counts_where_it_came(tmp_path):
    """Turn rewards −0.5, 0, +1, values 0: the critic is to learn 0.5, 1, 1."""
    path = tmp_path / "ppo.yaml"
    path.write_text(
        "rollout: {group_size: 1, tasks_per_update: 1}\ntrain: {num_minibatches: 1}\nalgorithm: {name: ppo}\n"
    )
    episodes = Episodes()
    turns = [episodes.turn(episodes.draw(2), 2, reward=reward) for reward in (-0.5, 0.0, 1.0)]
    episode = episodes.trajectory(turns, episode_return=0.5)
    batch, _ = make_batch([episode], BatchShape(1, 3, 16, 1, 3, 1), seed=(0,))
    old = batch.behavior_logprobs
    scores = Scores(old, batch.behavior_entropies, old, np.zeros_like(old))
    credit = jax.jit(make_algorithm_from(load_config(path)).credit)(batch, scores)
    for turn, expected in enumerate((0.5, 1.0, 1.0)):
        targets = np.asarray(credit.value_targets)[batch.loss_mask & (batch.turn_ids == turn)]
        np.testing.assert_allclose(targets, expected, atol=1e-6)
