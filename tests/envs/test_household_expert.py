"""The search expert solves everything, knows only what was shown, and recovers from any deviation."""

import random

import pytest

from empg_envs.household.env import HouseholdEnv
from empg_envs.household.expert import choose_command
from empg_envs.household.tables import LEVELS


def run_expert(env: HouseholdEnv, split: str, index: int) -> int:
    """Turns to a win; fails when there is none."""
    _, info = env.reset(split=split, index=index)
    for turn in range(1, env.max_turns + 1):
        action = env.expert_action()
        assert action in info["admissible"]
        _, reward, terminated, truncated, info = env.step(action)
        if terminated:
            assert reward == 1.0 and info["won"] and not truncated
            return turn
    raise AssertionError(f"expert did not solve {split} {index} in {env.max_turns} turns: {info['task']}")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_expert_solves_every_task_within_the_limit(level: str, split: str) -> None:
    env = HouseholdEnv(level)
    count = min(env.num_tasks(split), 300)
    turns = [run_expert(env, split, index) for index in range(count)]
    assert sum(turns) / count < env.max_turns / 2


@pytest.mark.parametrize("level", LEVELS)
def test_expert_recovers_from_random_beginnings(level: str) -> None:
    """After twenty random commands it still wins, within what a fresh episode would be given."""
    rng = random.Random(7)
    limit = LEVELS[level].max_turns
    env = HouseholdEnv(level, max_turns=20 + 2 * limit)
    for index in range(100):
        _, info = env.reset(split="train", index=index)
        done = False
        for _ in range(20):
            if not done:
                _, _, terminated, truncated, info = env.step(rng.choice(info["admissible"]))
                done = terminated or truncated
        while not done:
            action = env.expert_action()
            assert action in info["admissible"]
            _, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
        assert info["won"], f"{level} train {index}"


def test_expert_with_noise_mostly_wins_tiny() -> None:
    rng = random.Random(3)
    env = HouseholdEnv("tiny")
    wins = 0
    for index in range(400):
        _, info = env.reset(split="train", index=index)
        done = False
        while not done:
            action = rng.choice(info["admissible"]) if rng.random() < 0.15 else env.expert_action()
            _, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
        wins += info["won"]
    assert wins >= 0.93 * 400


@pytest.mark.parametrize("level", ["tiny", "medium"])
def test_expert_does_not_look_behind_what_was_shown(level: str) -> None:
    """Emptying every receptacle that has not been seen never changes its next command."""
    env = HouseholdEnv(level)
    for index in range(60):
        _, info = env.reset(split="train", index=index)
        while not info["won"]:
            action = env.expert_action()
            world, game = env._world, env._game
            assert world is not None and game is not None
            hidden = {name: world.contents[name] for name in world.contents if name not in world.seen}
            world.contents.update({name: [] for name in hidden})
            blind = choose_command(world, game.goal)
            world.contents.update(hidden)
            assert blind == action
            _, _, _, truncated, info = env.step(action)
            assert not truncated


def test_random_policy_hardly_ever_solves_tiny() -> None:
    rng = random.Random(11)
    env = HouseholdEnv("tiny")
    episodes = 1000
    wins = 0
    for index in range(episodes):
        _, info = env.reset(split="train", index=index)
        done = False
        while not done:
            _, _, terminated, truncated, info = env.step(rng.choice(info["admissible"]))
            done = terminated or truncated
        wins += info["won"]
    assert wins < 0.02 * episodes
