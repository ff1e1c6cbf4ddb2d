"""Ledgers of several hosts: no group and no place of the order in common, however their number changes."""

import collections
import json
import random

import pytest

from empg_jax.rollout.shares import join_cuts, take_share
from tests.rollout.test_ledger import make_ledger, play, take_starts

FAULTS = {"ended": 0, "in_a_row": [], "open": [], "until": []}
GROUPS = 12  # per update, over all hosts
TASKS = 1000


def make_ledgers(num, **options):
    return [
        make_ledger(groups=GROUPS // num, tasks=TASKS, share=(index, num), **options) for index in range(num)
    ]


def cut_all(ledgers, updates):
    """As a checkpoint holds it, through JSON."""
    cuts = [ledger.cut(updates) for ledger in ledgers]
    joined = join_cuts([values | {"faults": FAULTS} for values, _ in cuts])
    return json.loads(json.dumps(joined)), [episode for _, episodes in cuts for episode in episodes]


def share_out(num, cut, episodes, **options):
    ledgers = make_ledgers(num, **options)
    for index, ledger in enumerate(ledgers):
        ledger.restore(*take_share(cut, episodes, index, num))
    return ledgers


def update_all(ledgers, version, generator, failures=0.0):
    """Plays until every host has its groups of the next update; returns the episodes."""
    found = []
    for ledger in ledgers:
        reserved, waiting = None, []
        while reserved is None:
            ledger.admit(version)
            waiting += take_starts(ledger)
            generator.shuffle(waiting)
            for attempt in waiting[: len(waiting) // 2 + 1]:
                reason = "env_error" if generator.random() < failures else None
                ledger.finish(attempt, play(attempt, reason=reason, version=version))
            del waiting[: len(waiting) // 2 + 1]
            reserved = ledger.reserve()
        found += reserved.trajectories
        ledger.commit(version + 1)
        ledger.starts = []
        ledger.left = waiting
    return found


def test_hosts_play_what_one_would():
    generator = random.Random(0)
    (one,), several = make_ledgers(1), make_ledgers(3)
    for version in range(3):
        mine, theirs = update_all([one], version, generator), update_all(several, version, generator)
        key = lambda t: (t.group_id, t.member, t.task)  # noqa: E731
        assert sorted(map(key, mine)) == sorted(map(key, theirs))


@pytest.mark.parametrize(("max_lag", "failures"), [(0, 0.0), (2, 0.0), (0, 0.2), (2, 0.2)])
def test_any_change_of_their_number_keeps_every_task_exact(max_lag, failures):
    for seed in range(4):
        generator = random.Random(seed)
        ledgers, consumed = make_ledgers(2, max_lag=max_lag), []
        for version, num in enumerate((2, 2, 1, 4, 4, 3, 1, 2, 6, 1)):
            cut, episodes = cut_all(ledgers, version)
            ledgers = share_out(num, cut, episodes, max_lag=max_lag)
            consumed += update_all(ledgers, version, generator, failures)
        members = collections.Counter((t.group_id, t.member) for t in consumed)
        assert set(members.values()) == {1}
        tasks = collections.Counter(t.task for t in consumed)
        assert set(tasks.values()) == {2}  # one group of two attempts
        # Nothing is skipped: what is not consumed yet waits, and is not more than the hosts may hold.
        places = [ledgers[0].order.task_at(place) for place in range(len(tasks) + (max_lag + 2) * GROUPS)]
        assert set(tasks) <= set(places)
        cut, _ = cut_all(ledgers, 10)
        held = {group["task"] for group in cut["groups"]} | set(cut["again"])
        first = max(places.index(task) for task in {*tasks, *held}) + 1
        assert {*tasks, *held} == set(places[:first])


def test_the_same_number_of_hosts_goes_on_unchanged():
    ledgers = make_ledgers(2, max_lag=1)
    update_all(ledgers, 0, random.Random(1))
    cut, episodes = cut_all(ledgers, 1)
    again, _ = cut_all(share_out(2, cut, episodes, max_lag=1), 1)
    assert again == cut
