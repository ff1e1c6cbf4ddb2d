"""The ledger: every group is consumed exactly once, in time, whatever arrives in which order."""

import collections
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empg_jax.rollout.episode import Attempt
from empg_jax.rollout.ledger import MAX_LOSSES, MAX_RETRIES, Ledger, is_uniform
from empg_jax.rollout.order import TaskOrder
from empg_jax.run.storage import pack_trajectories, unpack_trajectories
from empg_jax.types import Outcome, Status
from tests.episodes import Episodes

EPISODES = Episodes()
LONG = 4  # a task that this divides takes long


def make_ledger(*, size=2, groups=2, max_lag=0, tasks=7, **options):
    order = TaskOrder("train", tasks, seed=1)
    return Ledger(order, group_size=size, groups_per_update=groups, max_lag=max_lag, **options)


def play(attempt, *, reason=None, version=0, value=None):
    """The end of an attempt."""
    outcome = Outcome(Status.DISCARDED, reason) if reason else Outcome(Status.TRAINED, "won")
    turn = EPISODES.turn([1, 2], 1, version=version)
    value = float(attempt.member) if value is None else value
    names = {"task": attempt.task, "group_id": attempt.group_id, "member": attempt.member}
    return EPISODES.trajectory([turn], outcome=outcome, episode_return=value, **names)


def take_starts(ledger):
    starts, ledger.starts = ledger.starts, []
    return starts


def run_all(ledger, fate=lambda attempt: None, **options):
    """Ends everything that was started; ``fate(attempt)`` is a reason for failure, None, or ``never``."""
    ended = []
    while starts := take_starts(ledger):
        for attempt in starts:
            if fate(attempt) != "never":
                ledger.finish(attempt, play(attempt, reason=fate(attempt), **options))
                ended.append(attempt)
    return ended


def groups_of(reserved):
    return list(dict.fromkeys(trajectory.group_id for trajectory in reserved.trajectories))


# -------------------------------------------------------------------------------------------- tasks


def test_each_pass_over_the_panel_has_every_task_once_in_a_new_order():
    order = TaskOrder("train", 50, seed=3)
    passes = [[order.task_at(50 * epoch + n) for n in range(50)] for epoch in range(4)]
    assert all(sorted(tasks) == list(range(50)) for tasks in passes)
    assert len({tuple(tasks) for tasks in passes}) == 4 and sorted(passes[0]) != passes[0]
    assert [TaskOrder("train", 50, seed=4).task_at(n) for n in range(50)] not in passes


def test_synchronous_updates_take_whole_groups_in_order():
    ledger, seen = make_ledger(size=3), []
    for update in range(4):
        ledger.commit(update)
        ledger.admit(update)
        run_all(ledger)
        reserved = ledger.reserve()
        assert reserved.update == update
        pairs = [(t.group_id, t.member) for t in reserved.trajectories]
        assert pairs == sorted(pairs) and len(pairs) == 6
        assert all(t.task == ledger.order.task_at(t.group_id) for t in reserved.trajectories)
        seen += groups_of(reserved)
        ledger.admit(update)  # nothing more before the learner is done
        assert not ledger.starts and ledger.reserve() is None
    assert seen == list(range(8)) and ledger.outcomes == {"trained:won": 24}


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_capacity(max_lag):
    ledger = make_ledger(max_lag=max_lag)
    ledger.admit(0)
    assert len(take_starts(ledger)) == (max_lag + 1) * 2 * 2
    ledger.admit(0)
    assert not ledger.starts


def test_no_group_is_admitted_that_no_update_would_consume():
    ledger = make_ledger(max_lag=4, updates=2)
    ledger.admit(0)
    assert len(take_starts(ledger)) == 2 * 2 * 2


@pytest.mark.parametrize("wrong", [{"size": 0}, {"groups": 0}, {"max_lag": -1}])
def test_sizes_are_checked(wrong):
    with pytest.raises(ValueError, match="at least"):
        make_ledger(**wrong)


# ------------------------------------------------------------------------------------------- faults


def test_a_discarded_attempt_is_made_again():
    ledger = make_ledger()
    ledger.admit(0)
    ended = run_all(ledger, lambda a: "env_error" if (a.group_id, a.member, a.retry) == (0, 1, 0) else None)
    assert [a.retry for a in ended if (a.group_id, a.member) == (0, 1)] == [0, 1]
    assert groups_of(ledger.reserve()) == [0, 1]
    assert ledger.outcomes == {"trained:won": 4, "discarded:env_error": 1}
    assert ledger.counts["tokens_wasted"] == 1


def test_a_group_that_fails_is_replaced_by_the_same_task():
    told = []
    ledger = make_ledger(tell=lambda event, **fields: told.append((event, fields)))
    ledger.admit(0)
    ended = run_all(ledger, lambda a: "env_error" if (a.group_id, a.member) == (0, 1) else None)
    assert [a.retry for a in ended if (a.group_id, a.member) == (0, 1)] == list(range(MAX_RETRIES))
    assert ledger.reserve() is None and ledger.cancels == []  # its other member had ended
    ledger.admit(0)
    run_all(ledger)
    reserved = ledger.reserve()
    assert groups_of(reserved) == [1, 2]
    assert reserved.trajectories[-1].task == ledger.order.task_at(0)
    assert ("group_replaced", {"reason": "failed", "group_id": 0, "split": "train"}) in [
        (event, {k: v for k, v in fields.items() if k != "task"}) for event, fields in told
    ]
    steps = 4 + MAX_RETRIES + 1  # of the groups that are trained on, and of those attempts
    assert ledger.counts == {"groups_failed": 1, "tokens_wasted": MAX_RETRIES + 1, "environment_steps": steps}


@pytest.mark.parametrize("members", [(0, 1), (1,)], ids=["every member", "one member"])
@pytest.mark.parametrize(
    ("reason", "groups"), [("env_error", MAX_LOSSES), ("quarantined", 1), ("prompt_too_long", 1)]
)
def test_a_task_that_always_fails_waits_for_the_next_pass(reason, groups, members):
    ledger = make_ledger(tasks=4)
    broken = ledger.order.task_at(0)
    ledger.admit(0)
    attempted = []
    for _ in range(5):
        attempted += run_all(ledger, lambda a: reason if a.task == broken and a.member in members else None)
        ledger.admit(0)
    reserved = ledger.reserve()
    assert broken not in {t.task for t in reserved.trajectories} and len(groups_of(reserved)) == 2
    assert len({a.group_id for a in attempted if a.task == broken}) == groups


def test_an_outage_costs_no_retry_and_what_came_before_it_is_forgiven():
    ledger = make_ledger()
    ledger.admit(0)
    for _ in range(5 * MAX_RETRIES):
        starts = take_starts(ledger)
        assert {attempt.retry for attempt in starts} == {0} and len(starts) == 4
        for attempt in starts:
            ledger.finish(attempt, play(attempt, reason="outage"))
    for round in range(3 * MAX_RETRIES):  # errors, before the pool knew of the outage
        for attempt in take_starts(ledger):
            assert attempt.retry == round  # new keys, or the policy would say the same again
            ledger.finish(attempt, play(attempt, reason="env_error"))
        ledger.forgive()
    run_all(ledger)
    assert groups_of(ledger.reserve()) == [0, 1] and not ledger.counts["groups_failed"]


def test_attempts_in_flight_of_a_replaced_group_are_given_up():
    ledger = make_ledger(size=3)
    ledger.admit(0)
    run_all(ledger, lambda a: {0: "quarantined", 1: "never"}.get(a.member) if a.group_id == 0 else None)
    assert ledger.cancels == [0] and ledger.outcomes["discarded:group_replaced"] == 2
    before = ledger.cut(0)[0]["groups"]
    late = Attempt("train", ledger.order.task_at(0), 0, 1)  # it ended before it could be given up
    ledger.finish(late, play(late))
    assert ledger.cut(0)[0]["groups"] == before and ledger.counts["tokens_wasted"] == 3


def test_every_attempt_is_counted_and_told_once():
    """Also where all attempts of a group that is replaced have ended in the same round."""
    told = []
    ledger = make_ledger(size=4, groups=1, tell=lambda event, **fields: told.append(event))
    ledger.admit(0)
    for attempt in take_starts(ledger):
        ledger.finish(attempt, play(attempt, reason="quarantined"))
    assert ledger.outcomes == {"discarded:quarantined": 1, "discarded:group_replaced": 3}
    assert told.count("episode_discarded") == 4
    assert ledger.counts["environment_steps"] == ledger.counts["tokens_wasted"] == 4


# ----------------------------------------------------------------------------------------- deadline


def test_a_group_closes_at_its_deadline_with_k_of_n():
    ledger = make_ledger(size=3, min_group_size=2, group_timeout=10.0)
    ledger.admit(0)
    late = [attempt for attempt in ledger.starts if attempt.member == 2]
    run_all(ledger, lambda a: "never" if a.member == 2 else None)
    ledger.close_late(dict.fromkeys(late, 10.0))
    assert ledger.reserve() is None
    ledger.close_late(dict.fromkeys(late, 10.1))
    assert ledger.cancels == [0, 1] and ledger.outcomes["discarded:group_closed"] == 2
    assert [t.member for t in ledger.reserve().trajectories] == [0, 1, 0, 1]


@pytest.mark.parametrize("options", [{}, {"min_group_size": 3}])
def test_without_enough_attempts_a_group_stays_open(options):
    ledger = make_ledger(size=3, group_timeout=0.0, **options)
    ledger.admit(0)
    starts = list(ledger.starts)
    run_all(ledger, lambda a: "never" if a.member == 2 else None)
    ledger.close_late(dict.fromkeys(starts, 1e9))
    assert ledger.reserve() is None and not ledger.cancels


def test_the_time_of_a_member_is_that_of_all_its_attempts():
    ledger = make_ledger(size=3, groups=1, min_group_size=2, group_timeout=10.0)
    ledger.admit(0)
    *quick, first = take_starts(ledger)
    for attempt in quick:
        ledger.finish(attempt, play(attempt), 9.0)
    ledger.finish(first, play(first, reason="env_error"), 6.0)
    ledger.close_late({})  # the next attempt waits for a slot
    (again,) = take_starts(ledger)
    ledger.close_late({again: 4.0})
    assert ledger.reserve() is None
    ledger.close_late({again: 4.1})
    assert ledger.cancels == [0] and len(ledger.reserve().trajectories) == 2


# --------------------------------------------------------------------------------- dynamic sampling


def every_third(attempt):
    """Groups 2, 5, 8, ... teach something."""
    return float(attempt.group_id % 3 == 2 and attempt.member)


def sample_dynamically(ledger, value=every_third):
    while (reserved := ledger.reserve()) is None:
        ledger.admit(0)
        for attempt in take_starts(ledger):
            ledger.finish(attempt, play(attempt, value=value(attempt)))
    return reserved


def test_uniform_groups_are_replaced_until_the_batch_is_full():
    told = []
    ledger = make_ledger(max_refills=10, tell=lambda event, **f: told.append((f["reason"], f["group_id"])))
    reserved = sample_dynamically(ledger)
    assert groups_of(reserved) == [2, 5]
    assert reserved.metrics == {"groups_replaced": 4.0, "groups_uniform": 0.0}
    assert told == [("uniform", group) for group in (0, 1, 3, 4)]
    assert len({t.task for t in reserved.trajectories}) == 2  # the next tasks, not the same again
    ledger.commit(1)
    assert groups_of(sample_dynamically(ledger)) == [8, 11]


def test_when_the_refills_are_used_up_uniform_groups_count():
    ledger = make_ledger(max_refills=1)
    reserved = sample_dynamically(ledger, lambda a: float(a.group_id == 1 and a.member))
    assert groups_of(reserved) == [1, 3]
    assert reserved.metrics == {"groups_replaced": 2.0, "groups_uniform": 1.0}


def test_without_a_filter_every_group_counts():
    reserved = sample_dynamically(make_ledger())
    assert groups_of(reserved) == [0, 1] and reserved.metrics == {}


def test_raw_returns_are_compared():
    """Invalid actions cost nothing here, and an episode that broke a limit returned what it was paid."""
    lost = EPISODES.transcript([(2, 1)], episode_return=0.0)
    turn = EPISODES.turn([1], 1, reward=0.0, is_valid=False)
    broken = Outcome(Status.SCORED_ZERO, "context_limit")
    assert is_uniform([lost, EPISODES.trajectory([turn], episode_return=0.0)])
    assert not is_uniform([lost, EPISODES.trajectory([turn], episode_return=0.5, outcome=broken)])


# ---------------------------------------------------------------------------------------------- lag


def test_quick_groups_overtake_only_while_slow_ones_can_still_be_in_time():
    ledger = make_ledger(size=1, groups=1, max_lag=2)
    ledger.admit(0)
    slow, *quick = take_starts(ledger)
    for attempt in quick:
        ledger.finish(attempt, play(attempt))
    assert groups_of(ledger.reserve()) == [1]
    # Group 2 must be consumed by update 2, as must group 0: if both waited for it, one would be late.
    assert groups_of(ledger.reserve()) == [2]
    ledger.commit(2)
    ledger.admit(2)
    for attempt in take_starts(ledger):
        ledger.finish(attempt, play(attempt, version=2))
    assert ledger.reserve() is None  # the learner waits for group 0, although 3 and 4 are ready
    ledger.finish(slow, play(slow))
    assert groups_of(ledger.reserve()) == [0]


class World:
    """Sampler and learner around a ledger, in rounds: a long task takes ``stretch`` rounds, others one.

    A random one of the two acts next, so that updates and episodes end in any order.
    """

    def __init__(self, seed, *, max_lag, groups, size, stretch, failures=0.0, tasks=40, **options):
        self.random = random.Random(seed)
        self.make = lambda: make_ledger(size=size, groups=groups, max_lag=max_lag, tasks=tasks, **options)
        self.ledger, self.stretch, self.failures, self.max_lag = self.make(), stretch, failures, max_lag
        self.flight, self.version, self.outbox = {}, 0, None
        self.consumed, self.begun = [], []
        self.ledger.admit(0)

    def sample(self):
        ledger = self.ledger
        for attempt in take_starts(ledger):
            self.flight[attempt] = [self.stretch if attempt.task % LONG == 0 else 1, ledger_version(self)]
            self.begun.append(attempt)
        for attempt, state in list(self.flight.items()):
            state[0] -= self.random.random() < 0.8
            if state[0] <= 0:
                del self.flight[attempt]
                fails = self.random.random() < self.failures
                ledger.finish(attempt, play(attempt, reason="env_error" if fails else None, version=state[1]))
        for group_id in ledger.cancels:
            self.flight = {a: s for a, s in self.flight.items() if a.group_id != group_id}
        ledger.cancels.clear()
        if self.outbox is None:
            self.outbox = ledger.reserve()
        ledger.admit(self.version)

    def learn(self):
        """Train on what is offered; the weights after it are live at once."""
        reserved, self.outbox = self.outbox, None
        assert reserved.update == self.version
        for trajectory in reserved.trajectories:
            assert 0 <= self.version - trajectory.oldest_version <= self.max_lag
        self.consumed.append(reserved)
        self.version += 1
        self.ledger.commit(self.version)
        self.ledger.admit(self.version)

    def restart(self):
        """Stop after the newest update, through a checkpoint, as JSON and arrays."""
        values, held = self.ledger.cut(self.version)
        values, held = json.loads(json.dumps(values)), unpack_trajectories(*pack_trajectories(held))
        self.ledger = self.make()
        self.ledger.restore(values, held)
        self.flight, self.outbox = {}, None
        self.ledger.admit(self.version)

    def run(self, updates, *, restarts=0.0):
        for _ in range(10_000):
            if self.outbox is not None and self.random.random() < 0.5:
                self.learn()
            else:
                self.sample()
            if self.random.random() < restarts:
                self.restart()
            if self.version == updates:
                return
        raise AssertionError("no progress")


def ledger_version(world):
    return world.version


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    max_lag=st.integers(0, 4),
    groups=st.integers(1, 4),
    size=st.integers(1, 3),
    stretch=st.sampled_from([1, 3, 12]),
    failures=st.sampled_from([0.0, 0.05, 0.3]),
    restarts=st.sampled_from([0.0, 0.05]),
)
def test_any_order_of_events_consumes_every_group_once_and_in_time(
    seed, max_lag, groups, size, stretch, failures, restarts
):
    world = World(seed, max_lag=max_lag, groups=groups, size=size, stretch=stretch, failures=failures)
    world.run(12, restarts=restarts)
    taken = [group for reserved in world.consumed for group in groups_of(reserved)]
    assert len(taken) == len(set(taken)) == 12 * groups
    members = collections.Counter(t.group_id for r in world.consumed for t in r.trajectories)
    assert set(members.values()) == {size}
    # What was begun is consumed, still there, or replaced by a group of its task.
    left = {entry["id"] for entry in world.ledger.cut(world.version)[0]["groups"]}
    replaced = {a.group_id for a in world.begun} - set(taken) - left
    assert len(replaced) <= world.ledger.counts["groups_failed"]
    if not failures:
        assert not replaced


@pytest.mark.parametrize("max_lag", [1, 2, 4])
@pytest.mark.parametrize("stretch", [2, 8, 30])
def test_long_tasks_are_trained_on_as_often_as_they_are_in_the_order(max_lag, stretch):
    updates, groups, tasks = 60, 4, 40
    world = World(3, max_lag=max_lag, groups=groups, size=2, stretch=stretch, tasks=tasks)
    world.run(updates)
    trained = [r.trajectories[i].task for r in world.consumed for i in range(0, 2 * groups, 2)]
    in_order = [world.ledger.order.task_at(n) for n in range(updates * groups)]
    # All of the order's first tasks, but for those that are still in flight.
    missing = collections.Counter(in_order) - collections.Counter(trained)
    assert missing.total() <= max_lag * groups
    share = sum(task % LONG == 0 for task in trained) / len(trained)
    expected = sum(task % LONG == 0 for task in in_order) / len(in_order)
    assert abs(share - expected) <= max_lag * groups / len(trained)


# ------------------------------------------------------------------------------------------- resume


def test_a_cut_counts_a_reserved_update_as_not_consumed():
    """The learner died between the reservation and the new weights: the same groups come again."""
    ledger = make_ledger(max_lag=1)
    ledger.admit(0)
    run_all(ledger)
    first = ledger.reserve()
    values, held = ledger.cut(0)
    again = make_ledger(max_lag=1)
    again.restore(json.loads(json.dumps(values)), held)
    assert not again.starts  # what had ended is not attempted again
    assert groups_of(again.reserve()) == groups_of(first) == [0, 1]
    # After the update, they are gone.
    values, held = ledger.cut(1)
    again.restore(values, held)
    assert groups_of(again.reserve()) == [2, 3]


def test_a_restored_ledger_attempts_only_what_had_not_ended():
    ledger = make_ledger(max_lag=1, min_group_size=1, group_timeout=0.0)
    ledger.admit(0)
    starts = list(ledger.starts)
    run_all(ledger, lambda a: "never" if a.member == 1 and a.group_id in (0, 2) else None)
    ledger.close_late(dict.fromkeys(starts, 1.0))
    assert sorted(ledger.cancels) == [0, 2]  # closed with one member: they stay closed
    values, held = ledger.cut(0)
    again = make_ledger(max_lag=1)
    again.restore(values, held)
    assert not again.starts and [t.member for t in again.reserve().trajectories] == [0, 0, 1]
    assert again.cut(0)[0] == values


def test_a_restored_ledger_keeps_retries_and_losses():
    ledger = make_ledger()
    ledger.admit(0)
    starts = take_starts(ledger)
    ledger.finish(starts[0], play(starts[0], reason="env_error"))
    values, held = ledger.cut(0)
    again = make_ledger()
    again.restore(json.loads(json.dumps(values)), held)
    assert [a.retry for a in again.starts if (a.group_id, a.member) == (0, 0)] == [1]
