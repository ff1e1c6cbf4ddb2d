"""An engine that says what a script tells it, and the small parts that a collector needs besides."""

from types import SimpleNamespace

import numpy as np

from empg_jax.engine.engine import Response
from empg_jax.rollout.collector import Collector
from empg_jax.rollout.context import PromptDelta
from empg_jax.rollout.episode import Attempt, EpisodeRules


class ScriptedEngine:
    """Answers every prompt with the tokens ``[group, turn]``, after ``bursts`` steps.

    Attributes:
      submitted: ids of every response that was asked for, in order.
      capacity: tokens that a conversation may hold.
    """

    def __init__(self, slots=3, capacity=10**6, bursts=1):
        self.config = SimpleNamespace(slots=slots, max_tokens=capacity)
        self.submitted, self.version = [], 0
        self._bursts = bursts
        self._held = dict.fromkeys(range(slots), 0)
        self._pending = {}

    @property
    def has_work(self):
        return bool(self._pending)

    def room(self, slot, num_new, *, is_fresh):
        return self.config.max_tokens - num_new - (0 if is_fresh else self._held[slot])

    def submit(self, slot, tokens, *, is_fresh, ids, watch):
        assert slot not in self._pending
        self.submitted.append(ids)
        self._held[slot] = len(tokens) + (0 if is_fresh else self._held[slot])
        self._pending[slot] = [ids, self._bursts]

    def release(self, slot):
        self._pending.pop(slot, None)
        self._held[slot] = 0

    def step(self, *, is_eager=True):
        for work in self._pending.values():
            work[1] -= 1
        done = [slot for slot, (_, left) in self._pending.items() if not left]
        return [self._respond(slot, self._pending.pop(slot)[0]) for slot in done]

    def _respond(self, slot, ids):
        self._held[slot] += 2
        zeros = np.zeros(2, np.float32)
        tokens = np.asarray([ids[1], ids[3]], np.int32)
        versions = np.full(2, self.version, np.int32)
        return Response(slot, np.zeros(1, np.int32), tokens, zeros, zeros, versions, "stop")


class Speaker(ScriptedEngine):
    """Says one response at every turn; ``prompts`` are the tokens that it was given, in order."""

    def __init__(self, tokens):
        super().__init__(slots=1)
        self.prompts = []
        self._tokens = np.asarray(tokens, np.int32)

    def submit(self, slot, tokens, **options):
        self.prompts.append(list(tokens))
        super().submit(slot, tokens, **options)

    def _respond(self, slot, ids):
        zeros = np.zeros(len(self._tokens), np.float32)
        versions = np.zeros(len(self._tokens), np.int32)
        return Response(slot, np.zeros(1, np.int32), self._tokens, zeros, zeros, versions, "stop")


class TokenContext:
    """Every prompt is one token."""

    def start(self, observation, info):
        return PromptDelta([1], True)

    def follow(self, *_):
        return PromptDelta([1], False)


def parse(text, info):
    return SimpleNamespace(action=text, is_valid=True)


def make_collector(engine, pool, script=None, *, max_turns=4, make_context=TokenContext, **options):
    """A collector whose policy says ``script[group, turn]``, else ``go``."""

    def decode(tokens):
        return (script or {}).get(tuple(tokens), "go")

    rules = EpisodeRules(max_turns=max_turns)
    return Collector(engine, pool, make_context, parse, decode, rules, seed=5, **options)


def attempts(count, **fields):
    """One attempt per group; the group's number is its task's."""
    return [
        Attempt(**({"split": "train", "task": n, "group_id": n, "member": 0} | fields)) for n in range(count)
    ]


def run(collector, admitted):
    """Runs attempts to their end; trajectories by group, in the order in which they ended."""
    collector.admit(admitted)
    found = {}
    while collector.in_flight:
        for attempt, trajectory in collector.advance():
            assert attempt.group_id not in found
            found[attempt.group_id] = trajectory
    return found
