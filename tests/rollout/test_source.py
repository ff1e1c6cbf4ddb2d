"""Groups of attempts: which task when, what is refilled, replaced, closed early, dropped, and restored."""

import collections
import json
import time

import pytest

from empg_jax.rollout.buffer import ReplayBuffer
from empg_jax.rollout.source import MAX_RETRIES, GroupSource, Interrupted, TaskOrder
from empg_jax.run.storage import pack_trajectories, unpack_trajectories
from empg_jax.types import Outcome, Status
from tests.episodes import Episodes

EPISODES = Episodes()


class ScriptedCollector:
    """Ends ``pace`` attempts per round; ``fate(attempt)`` is a reason for failure, None, or ``never``."""

    def __init__(self, fate=lambda attempt: None, pace=2):
        self.fate, self.pace, self.version = fate, pace, 0
        self.queue = collections.deque()
        self.attempted = []

    @property
    def in_flight(self):
        return len(self.queue)

    def admit(self, attempts):
        self.queue.extend(attempts)

    def cancel(self, group_id):
        dropped = [a for a in self.queue if a.group_id == group_id]
        self.queue = collections.deque(a for a in self.queue if a.group_id != group_id)
        return dropped

    def advance(self):
        able = [a for a in self.queue if self.fate(a) != "never"][: self.pace]
        for attempt in able:
            self.queue.remove(attempt)
        self.attempted += able
        return [(a, self.play(a)) for a in able]

    def play(self, attempt):
        reason = self.fate(attempt)
        outcome = Outcome(Status.DISCARDED, reason) if reason else Outcome(Status.TRAINED, "won")
        names = {"task": attempt.task, "group_id": attempt.group_id, "member": attempt.member}
        turn = EPISODES.turn([1, 2], 1, version=self.version)
        return EPISODES.trajectory([turn], outcome=outcome, **names)


def make_source(fate=lambda attempt: None, *, size=3, max_lag=0, tasks=7, groups=2, pace=2, **options):
    order = TaskOrder("train", tasks, seed=1)
    buffer = ReplayBuffer(group_size=size, max_lag=max_lag)
    return GroupSource(ScriptedCollector(fate, pace), buffer, order, groups_per_batch=groups, **options)


def go_on():
    return False


def stop_after(rounds):
    left = iter([False] * rounds + [True])
    return lambda: next(left)


def members_of(batch):
    """Group -> members, in the order of the batch."""
    found = {}
    for trajectory in batch:
        found.setdefault(trajectory.group_id, []).append(trajectory.member)
    return found


# -------------------------------------------------------------------------------------------- tasks


def test_each_pass_over_the_panel_has_every_task_once_in_a_new_order():
    order = TaskOrder("train", 50, seed=3)
    passes = [[order.task_of(50 * epoch + n) for n in range(50)] for epoch in range(4)]
    assert all(sorted(tasks) == list(range(50)) for tasks in passes)
    assert len({tuple(tasks) for tasks in passes}) == 4 and sorted(passes[0]) != passes[0]
    assert [TaskOrder("train", 50, seed=4).task_of(n) for n in range(50)] not in passes


def test_the_order_of_tasks_is_a_pure_function_of_the_group():
    order = TaskOrder("train", 5, seed=3)
    forwards = [order.task_of(group) for group in range(23)]
    assert [order.task_of(group) for group in reversed(range(23))] == forwards[::-1]


def test_batches_are_whole_groups_of_one_task_each_sorted():
    source = make_source()
    seen = []
    for _ in range(4):
        batch = source.collect(0, go_on)
        assert list(members_of(batch).values()) == [[0, 1, 2]] * 2
        assert [(t.group_id, t.member) for t in batch] == sorted((t.group_id, t.member) for t in batch)
        seen += members_of(batch)
        for trajectory in batch:
            assert trajectory.task == source.order.task_of(trajectory.group_id)
    assert seen == list(range(8))
    assert source.outcomes == {"trained:won": 24}


# ------------------------------------------------------------------------------------------- faults


def test_a_discarded_attempt_is_made_again():
    source = make_source(lambda a: "env_error" if (a.group_id, a.member, a.retry) == (0, 1, 0) else None)
    assert members_of(source.collect(0, go_on)) == {0: [0, 1, 2], 1: [0, 1, 2]}
    tries = [a.retry for a in source.collector.attempted if (a.group_id, a.member) == (0, 1)]
    assert tries == [0, 1] and source.buffer.stats.refilled == 1
    assert source.outcomes == {"trained:won": 6, "discarded:env_error": 1}


@pytest.mark.parametrize(("reason", "tries"), [("env_error", MAX_RETRIES), ("quarantined", 1)])
def test_a_task_that_always_fails_makes_room_for_another_group(reason, tries):
    source = make_source(lambda a: reason if (a.group_id, a.member) == (0, 1) else None)
    assert members_of(source.collect(0, go_on)) == {1: [0, 1, 2], 2: [0, 1, 2]}
    assert source.outcomes[f"discarded:{reason}"] == tries
    assert not any(a.group_id == 0 for a in source.collector.queue)
    assert source.buffer.contents() == []


def test_a_scored_zero_attempt_is_trained_on():
    source = make_source(size=1, groups=1)
    source.collector.play = lambda a: EPISODES.trajectory(
        [EPISODES.turn([1], 1)], group_id=a.group_id, outcome=Outcome(Status.SCORED_ZERO, "context_limit")
    )
    assert len(source.collect(0, go_on)) == 1
    assert source.outcomes == {"scored_zero:context_limit": 1}


# ----------------------------------------------------------------------------------------- deadline


def never_third(attempt):
    return "never" if attempt.member == 2 else None


def test_a_group_closes_at_its_deadline_with_k_of_n():
    source = make_source(never_third, min_group_size=2, group_timeout=0.05)
    began = time.monotonic()
    batch = source.collect(0, go_on)
    assert members_of(batch) == {0: [0, 1], 1: [0, 1]}
    assert time.monotonic() - began >= 0.05
    assert source.outcomes["discarded:group_closed"] == 2 and source.collector.in_flight == 0
    # The next groups have deadlines of their own.
    began = time.monotonic()
    assert members_of(source.collect(0, go_on)) == {2: [0, 1], 3: [0, 1]}
    assert time.monotonic() - began >= 0.05


@pytest.mark.parametrize("options", [{}, {"min_group_size": 3}])
def test_without_enough_attempts_a_group_stays_open(options):
    source = make_source(never_third, group_timeout=0.0, **options)
    with pytest.raises(Interrupted):
        source.collect(0, stop_after(50))
    assert source.snapshot()["open"] == [[0, [2]], [1, [2]]]


# ---------------------------------------------------------------------------------------------- lag


def test_synchronous_training_leaves_nothing_in_flight():
    source = make_source()
    source.collect(0, go_on)
    assert source.collector.in_flight == 0


def test_with_a_lag_sampling_goes_on_and_staleness_is_bounded():
    source = make_source(max_lag=1, pace=5)
    for version in range(6):
        source.collector.version = version
        batch = source.collect(version, go_on)
        assert len(members_of(batch)) == 2
        assert all(0 <= version - trajectory.oldest_version <= 1 for trajectory in batch)
        assert source.collector.in_flight > 0


def test_groups_that_grew_too_old_are_dropped_with_their_attempts():
    """Group 0 has a straggler that only ends long after its batch."""
    slow = {"is": True}
    source = make_source(
        lambda a: "never" if slow["is"] and (a.group_id, a.member) == (0, 0) else None, max_lag=1
    )
    released = set()
    for version in range(3):
        source.collector.version = version
        released |= set(members_of(source.collect(version, go_on)))
    assert 0 not in released and source.buffer.stats.stale_groups == 1
    assert not any(a.group_id == 0 for a in source.collector.queue)
    assert 0 not in dict(source.snapshot()["open"])


# ------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("max_lag", [0, 1])
@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_a_restored_source_releases_the_same_groups(rounds, max_lag):
    whole = make_source(max_lag=max_lag)
    whole.collect(0, go_on)
    with pytest.raises(Interrupted):
        whole.collect(0, stop_after(rounds))
    # Through JSON and arrays, as a checkpoint does it.
    snapshot = json.loads(json.dumps(whole.snapshot()))
    held = unpack_trajectories(*pack_trajectories(whole.buffer.contents()))
    restored = make_source(max_lag=max_lag)
    restored.restore(snapshot, held)
    assert restored.snapshot() == whole.snapshot()
    for _ in range(3):
        assert members_of(restored.collect(0, go_on)) == members_of(whole.collect(0, go_on))
    assert restored.outcomes == whole.outcomes
    # What was held was not attempted again.
    done = {(t.group_id, t.member) for t in held}
    assert not done & {(a.group_id, a.member) for a in restored.collector.attempted}


def test_a_group_that_was_closed_early_stays_closed_when_restored():
    source = make_source(never_third, groups=2, min_group_size=2, group_timeout=0.0, pace=3)
    with pytest.raises(Interrupted):
        source.collect(0, stop_after(1))
    assert source.snapshot()["open"] == [[0, []], [1, [1, 2]]]
    restored = make_source(never_third, groups=1)
    restored.restore(source.snapshot(), source.buffer.contents())
    assert members_of(restored.collect(0, go_on)) == {0: [0, 1]}
