"""An environment of your own: find a number from 0 to 9. In this folder, say:

empg-jax train quickstart env.name=null env.entry_point=own_env:GuessEnv
"""

import hashlib


class GuessEnv:
    """Arguments are options: env.options.turns=3. Without expert_action, set sft.updates=0."""

    def __init__(self, turns=4):
        self.turns = turns

    def reset(self, seed=None, *, split="train", index=0):
        self.secret, self.low, self.high, self.count = self.get_task(split, index)["secret"], 0, 9, 0
        return "0-9", {"task": "find the number", "won": False}

    def step(self, action):
        guess = int(action) if action in list("0123456789") else -1  # whatever the text, it is an action
        won, self.count = guess == self.secret, self.count + 1
        self.low = max(self.low, guess + 1) if guess < self.secret else self.low
        self.high = min(self.high, guess - 1) if guess > self.secret else self.high
        # Observation, reward, terminated (solved), truncated (out of time), info.
        return f"{self.low}-{self.high}", float(won), won, not won and self.count >= self.turns, {"won": won}

    def close(self):
        pass

    def list_splits(self):
        return ["train", "test"]

    def num_tasks(self, split):
        return {"train": 1000, "test": 256}[split]

    def get_task(self, split, index):
        digest = hashlib.sha256(f"{split}/{index}".encode()).hexdigest()
        return {"secret": int(digest, 16) % 10, "content_hash": digest}

    def expert_action(self):
        return str((self.low + self.high) // 2)
