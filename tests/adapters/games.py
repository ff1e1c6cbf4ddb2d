"""Environments of Gymnasium and an opponent of TextArena, as a user would write them.

``tests.adapters.games:Guess-v0`` names them for ``gymnasium.make``, which imports this module first.
"""

import gymnasium
from gymnasium.spaces import Discrete, Text

LETTERS = "abcdefghijklmnopqrstuvwxyz "


class GuessEnv(gymnasium.Env):
    """Say the word that the observation asks for: both spaces are text."""

    observation_space = Text(40, charset=LETTERS + ":")
    action_space = Text(10, charset=LETTERS)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.word = "".join(LETTERS[n] for n in self.np_random.integers(0, 26, 3))
        return f"say: {self.word}", {"number": self.np_random}  # not JSON: it does not cross

    def step(self, action):
        won = action == self.word
        return f"say: {self.word}", float(won), won, False, {"is_success": won}


class DialEnv(gymnasium.Env):
    """Turn a dial to 3 with two actions, which are counted from 1; ``step`` pays 1 per turn."""

    observation_space = Discrete(10)
    action_space = Discrete(2, start=1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.value = int(self.np_random.integers(4, 7))
        return self.value, {}

    def step(self, action):
        self.value += 1 if action == 2 else -1
        return self.value, 1.0, self.value == 3, self.value == 9, {}


def describe(observation):
    return f"the dial shows {observation}"


def play_last(seen, dice):
    """The last of the moves that are shown last."""
    return "[" + seen.rpartition("[")[2].partition("]")[0] + "]"


def give_up(seen, dice):
    """No move."""
    raise ValueError("no move")


gymnasium.register("Guess-v0", GuessEnv)
gymnasium.register("Dial-v0", DialEnv)
