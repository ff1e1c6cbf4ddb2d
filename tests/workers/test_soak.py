"""A soak of the whole rollout path with a simulated policy and environments that break all the time.

Every step crashes its worker with 1 % chance and hangs with 1 %, and workers are killed from outside
besides. ``SOAK_SECONDS`` sets the duration.
"""

import collections
import contextlib
import gc
import os
import random
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest

from empg_jax.engine.engine import Response
from empg_jax.rollout.buffer import ReplayBuffer
from empg_jax.rollout.collector import Collector
from empg_jax.rollout.context import PromptDelta
from empg_jax.rollout.episode import EpisodeRules
from empg_jax.rollout.source import GroupSource, TaskOrder
from empg_jax.workers.pool import EnvPool, PoolTimeouts

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("SOAK_SECONDS", "60"))
SLOTS, GROUP_SIZE, GROUPS_PER_BATCH, LENGTH, TASKS = 24, 4, 4, 5, 500
SECONDS_PER_KILL = 0.7
SEED = 11


class SimulatedEngine:
    """Answers every prompt with one random token, after a random number of bursts."""

    def __init__(self):
        self.config = SimpleNamespace(slots=SLOTS, max_tokens=10**6)
        self._random = random.Random(0)
        self._pending = {}

    @property
    def has_work(self):
        return bool(self._pending)

    def room(self, slot, num_new, *, is_fresh):
        return 1

    def submit(self, slot, tokens, *, is_fresh, ids):
        assert slot not in self._pending
        self._pending[slot] = np.asarray(tokens, np.int32)

    def release(self, slot):
        self._pending.pop(slot, None)

    def step(self, *, is_eager=True):
        done = [slot for slot in self._pending if self._random.random() < 0.7]
        return [self._respond(slot, self._pending.pop(slot)) for slot in done]

    def _respond(self, slot, prompt):
        zeros = np.zeros(1, np.float32)
        token = np.asarray([self._random.randrange(1000)], np.int32)
        return Response(slot, prompt, token, zeros, zeros, 0, "stop")


class Context:
    """Prompts do not matter here."""

    def start(self, observation, info):
        return PromptDelta([1], True)

    def follow(self, *_):
        return PromptDelta([1], False)


def parse(text, info):
    return SimpleNamespace(action=text, is_valid=True)


def check_trajectory(trajectory):
    """Every turn answers the right observation: nothing lost, doubled or mixed up with a neighbor."""
    previous = ""
    for number, turn in enumerate(trajectory.turns):
        assert turn.observation == f"train/{trajectory.task}/{SEED} step {number} after {previous!r}"
        previous = f"say {turn.response_tokens[0]}"
    assert len(trajectory.turns) == LENGTH and trajectory.episode_return == 1.0 and trajectory.terminated


def count_resources():
    """Resident MiB, open descriptors and child processes of this process."""
    gc.collect()
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    with open(f"/proc/self/task/{os.getpid()}/children") as children:
        return resident, len(os.listdir("/proc/self/fd")), len(children.read().split())


class Soak:
    """The parts, put together as a training run does."""

    def __init__(self, pool):
        self.pool = pool
        self.buffer = ReplayBuffer(group_size=GROUP_SIZE, max_lag=1)
        collector = Collector(
            SimulatedEngine(),
            pool,
            Context,
            parse,
            lambda tokens: f"say {tokens[0]}",
            EpisodeRules(max_turns=LENGTH + 1),
            seed=SEED,
        )
        order = TaskOrder("train", TASKS, seed=0)
        self.source = GroupSource(collector, self.buffer, order, groups_per_batch=GROUPS_PER_BATCH)
        self.released = set()
        self.kills = 0
        self._next_kill = time.monotonic()
        self._next_replies = 0

    def disturb(self):
        """Kills a worker from outside now and then. Asked by the source every round."""
        pids, replies = self.pool.worker_pids(), self.pool.stats.replies
        if pids and time.monotonic() > self._next_kill and replies >= self._next_replies:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[self.kills % len(pids)], signal.SIGKILL)
            self.kills += 1
            self._next_kill, self._next_replies = time.monotonic() + SECONDS_PER_KILL, replies + 50
        return False

    def run(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            batch = self.source.collect(0, self.disturb)
            members = collections.defaultdict(list)
            for trajectory in batch:
                check_trajectory(trajectory)
                members[trajectory.group_id].append(trajectory.member)
            assert len(members) == GROUPS_PER_BATCH
            for group_id, present in members.items():
                assert group_id not in self.released, f"group {group_id} was released twice"
                assert present == list(range(GROUP_SIZE))
                self.released.add(group_id)


def test_soak_loses_and_doubles_nothing(capsys):
    timeouts = PoolTimeouts(start=30, reset=5, step=0.4)
    options = {"crash": 0.01, "hang": 0.01, "length": LENGTH, "tasks": TASKS}
    with EnvPool("tests.fakes:UnreliableEnv", options, num_workers=2, timeouts=timeouts) as pool:
        soak = Soak(pool)
        soak.run(SECONDS / 4)
        before = count_resources()
        soak.run(SECONDS * 3 / 4)
        after = count_resources()
        stats, snapshot = pool.stats, soak.source.snapshot()
        pids = pool.worker_pids()

    # Every group that was begun is accounted for: released once, still open, or given up by name.
    still_open = {group_id for group_id, _ in snapshot["open"]}
    begun = set(range(snapshot["next_group"]))
    given_up = begun - soak.released - still_open
    outcomes = collections.Counter(snapshot["outcomes"])
    discarded = sum(count for name, count in outcomes.items() if name.startswith("discarded:"))
    assert soak.released <= begun and not soak.released & still_open
    assert 3 * len(given_up) <= discarded + soak.buffer.stats.refilled
    assert discarded == stats.failures.total()
    assert outcomes["trained:won"] + discarded == outcomes.total()
    assert set(stats.failures) <= {"timeout", "worker_died", "quarantined", "outage"}
    # The faults did happen, and neighbors survived them.
    assert stats.failures["timeout"] and stats.failures["worker_died"] and stats.recovered
    assert len(soak.released) > SECONDS
    # Nothing grows: memory, processes, descriptors beyond the three that each living worker takes.
    assert after[0] - before[0] < 16
    assert after[2] <= before[2] + 1
    assert after[1] - 3 * after[2] <= before[1] - 3 * before[2] + 2
    for pid in pids:
        assert not os.path.exists(f"/proc/{pid}")
    with capsys.disabled():
        print(
            f"\nsoak of {SECONDS:g} s: groups begun {len(begun)}, released {len(soak.released)}, "
            f"open {len(still_open)}, given up {len(given_up)}, lost 0, doubled 0; "
            f"outcomes {dict(outcomes)}; kills {soak.kills}; pool {stats.as_dict()}; "
            f"memory {before[0]:.0f} -> {after[0]:.0f} MiB, descriptors {before[1]} -> {after[1]}"
        )
