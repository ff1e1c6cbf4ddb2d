"""Made-up trajectories: every sampled token is unique, so that a lost or doubled one shows."""

import itertools

import numpy as np

from empg_jax.types import Outcome, Status, Trajectory, Turn

TRAINED = Outcome(Status.TRAINED, "won")


class Episodes:
    """Makes trajectories. Log-probs and entropies are functions of the token, to be checked in the batch."""

    def __init__(self, seed=0):
        self.generator = np.random.default_rng(seed)
        self.fresh = itertools.count(1)

    def draw(self, length):
        """Tokens that were never drawn before."""
        return np.array([next(self.fresh) for _ in range(length)], np.int32)

    def turn(self, prompt, length, **fields):
        response = self.draw(length)
        values = dict(reward=0.0, version=0, anchor=0, is_valid=True, finish_reason="stop") | fields
        return Turn(
            prompt_tokens=np.asarray(prompt, np.int32),
            response_tokens=response,
            behavior_logprobs=logprob_of(response),
            entropies=entropy_of(response),
            **values,
        )

    def transcript(self, lengths, **fields):
        """Turns ``(observation length, response length)``, each prompt extending what came before."""
        turns, so_far = [], np.zeros(0, np.int32)
        for observation, response in lengths:
            prompt = np.concatenate([so_far, self.draw(observation)])
            turns.append(self.turn(prompt, response))
            so_far = np.concatenate([prompt, turns[-1].response_tokens])
        return self.trajectory(turns, **fields)

    def window(self, lengths, **fields):
        """Turns ``(prompt length, response length)`` with a fresh prompt each."""
        return self.trajectory([self.turn(self.draw(p), r) for p, r in lengths], **fields)

    def trajectory(self, turns, **fields):
        values = dict(task=0, split="train", group_id=0, member=0, outcome=TRAINED, episode_return=1.0)
        values |= dict(is_success=True, terminated=True, truncated=False) | fields
        return Trajectory(turns=tuple(turns), **values)


def logprob_of(tokens):
    return -np.asarray(tokens, np.float32) / np.float32(1024)


def entropy_of(tokens):
    return np.asarray(tokens, np.float32) / np.float32(64)
