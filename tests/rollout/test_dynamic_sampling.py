"""Dynamic sampling: groups of equal returns are replaced, within a limit, and a resumed run goes on alike."""

import collections
import dataclasses

import pytest

from empg_jax.rollout.buffer import ReplayBuffer
from empg_jax.rollout.source import GroupFilter, GroupSource, Interrupted, TaskOrder, is_uniform
from empg_jax.types import Outcome, Status
from tests.episodes import Episodes

EPISODES = Episodes()
TASKS = TaskOrder("train", 1000, seed=3)


class ScriptedCollector:
    """Ends ``pace`` attempts per round, oldest first; ``returns_of(group)[member]`` is what they return."""

    def __init__(self, returns_of, pace=3):
        self.returns_of, self.pace = returns_of, pace
        self.queue = collections.deque()
        self.attempted = []

    def admit(self, attempts):
        self.queue.extend(attempts)

    def cancel(self, group_id):
        dropped = [a for a in self.queue if a.group_id == group_id]
        self.queue = collections.deque(a for a in self.queue if a.group_id != group_id)
        return dropped

    def advance(self):
        taken = [self.queue.popleft() for _ in range(min(self.pace, len(self.queue)))]
        self.attempted += [(a.group_id, a.member) for a in taken]
        return [(a, episode(a.group_id, a.member, self.returns_of(a.group_id)[a.member])) for a in taken]


def episode(group_id, member, episode_return):
    return EPISODES.transcript([(2, 1)], group_id=group_id, member=member, episode_return=episode_return)


def make_source(returns_of, *, size=2, group_filter, max_lag=0, pace=3, **options):
    buffer = ReplayBuffer(group_size=size, max_lag=max_lag)
    collector = ScriptedCollector(returns_of, pace)
    return GroupSource(collector, buffer, TASKS, groups_per_batch=3, group_filter=group_filter, **options)


def go_on():
    return False


def groups_of(batch):
    return list(dict.fromkeys(trajectory.group_id for trajectory in batch))


def every_third(group_id):
    """Groups 2, 5, 8, ... teach something."""
    return (0.0, float(group_id % 3 == 2))


def test_uniform_groups_are_replaced_until_the_batch_is_full():
    source = make_source(every_third, group_filter=GroupFilter(10))
    assert groups_of(source.collect(0, go_on)) == [2, 5, 8]
    assert source.metrics == {"groups_replaced": 6.0, "groups_uniform": 0.0}
    assert source.buffer.contents() == []
    # The count begins anew; what is in flight was admitted before.
    assert groups_of(source.collect(0, go_on)) == [11, 14, 17]
    assert source.metrics["groups_replaced"] == 6.0


def test_without_a_filter_every_group_counts():
    source = make_source(every_third, group_filter=None)
    assert groups_of(source.collect(0, go_on)) == [0, 1, 2]
    assert source.metrics == {}


@pytest.mark.parametrize("max_refills", [1, 2])
def test_when_the_refills_are_used_up_uniform_groups_count(max_refills):
    source = make_source(lambda group_id: (0.0, float(group_id == 1)), group_filter=GroupFilter(max_refills))
    batch = source.collect(0, go_on)
    first_that_counts = 3 * max_refills + 1  # group 1 is kept, so one more is replaced
    assert groups_of(batch) == [1, first_that_counts, first_that_counts + 1]
    assert source.metrics == {"groups_replaced": 3.0 * max_refills, "groups_uniform": 2.0}


def test_raw_returns_are_compared():
    """Invalid actions cost nothing here, and an episode that broke a limit returned what it was paid."""
    turn = EPISODES.turn([1], 1, reward=0.0, is_valid=False)
    assert is_uniform([episode(0, 0, 0.0), changed(turns=(turn,), episode_return=0.0)])
    assert not is_uniform([episode(0, 0, 0.0), episode(0, 1, 1.0)])
    broken = Outcome(Status.SCORED_ZERO, "context_limit")
    assert not is_uniform([episode(0, 0, 0.0), changed(episode_return=0.5, outcome=broken)])


def changed(**fields):
    return dataclasses.replace(episode(0, 1, 0.0), **fields)


def test_a_group_that_is_replaced_is_told():
    told = []

    def tell(event, **fields):
        told.append((event, fields["reason"], fields["group_id"]))

    source = make_source(every_third, group_filter=GroupFilter(10), tell=tell)
    source.collect(0, go_on)
    assert told == [("group_replaced", "uniform", group) for group in (0, 1, 3, 4, 6, 7)]


@pytest.mark.parametrize("rounds", range(1, 14, 3))
@pytest.mark.parametrize("max_lag", [0, 1])
def test_a_resumed_run_attempts_and_trains_the_same(rounds, max_lag):
    """Cut off at any moment and restored from the last boundary: the batches are those of a whole run."""
    options = {"group_filter": GroupFilter(2), "max_lag": max_lag, "pace": 2}
    whole = make_source(every_third, **options)
    first = groups_of(whole.collect(0, go_on))
    boundary, held = whole.snapshot(), whole.buffer.contents()
    expected = [groups_of(whole.collect(0, go_on)), whole.metrics, groups_of(whole.collect(0, go_on))]

    cut = make_source(every_third, **options)
    assert groups_of(cut.collect(0, go_on)) == first
    left = iter([False] * rounds + [True])
    with pytest.raises(Interrupted):
        while True:
            cut.collect(0, lambda: next(left))

    resumed = make_source(every_third, **options)
    resumed.restore(boundary, held)
    found = [groups_of(resumed.collect(0, go_on)), resumed.metrics, groups_of(resumed.collect(0, go_on))]
    assert found == expected


def test_a_snapshot_in_the_middle_keeps_the_count():
    source = make_source(every_third, group_filter=GroupFilter(2))
    left = iter([False] * 5 + [True])
    with pytest.raises(Interrupted):
        source.collect(0, lambda: next(left))
    assert source.snapshot()["replaced"] == 5  # of the groups 0 to 6
    resumed = make_source(every_third, group_filter=GroupFilter(2))
    resumed.restore(source.snapshot(), source.buffer.contents())
    source.collect(0, go_on)
    resumed.collect(0, go_on)
    assert resumed.metrics == source.metrics


def test_a_group_closed_at_its_deadline_is_judged_by_those_who_came():
    buffer = ReplayBuffer(group_size=3, max_lag=0)
    collector = ScriptedCollector(lambda group_id: (0.0, float(group_id > 2), 1.0), pace=1)
    source = GroupSource(
        collector,
        buffer,
        TASKS,
        groups_per_batch=1,
        min_group_size=2,
        group_timeout=0.0,
        group_filter=GroupFilter(10),
    )
    assert groups_of(source.collect(0, go_on)) == [3]
    assert source.metrics["groups_replaced"] == 3.0
