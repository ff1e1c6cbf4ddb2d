"""Groups leave whole, fresh and once."""

import pytest

from empg_jax.rollout.buffer import ReplayBuffer
from empg_jax.types import Outcome, Status
from tests.episodes import Episodes


def make_trajectory(group_id, member, version=0, **fields):
    episodes = Episodes()
    turns = [episodes.turn(episodes.draw(2), 1, version=v) for v in (version, version + 1)]
    return episodes.trajectory(turns, group_id=group_id, member=member, **fields)


def names(trajectories):
    return [(t.group_id, t.member) for t in trajectories]


def test_groups_leave_complete_and_oldest_first():
    buffer = ReplayBuffer(group_size=2, max_lag=1)
    for group_id, member in [(8, 1), (3, 1), (5, 0), (8, 0)]:
        buffer.add(make_trajectory(group_id, member))
    assert buffer.ready() == [8]
    assert buffer.release(2) is None
    buffer.add(make_trajectory(3, 0))
    assert buffer.ready() == [3, 8]
    assert names(buffer.release(1)) == [(3, 0), (3, 1)]
    assert names(buffer.release(1)) == [(8, 0), (8, 1)]
    assert buffer.release(1) is None
    assert names(buffer.contents()) == [(5, 0)]
    assert (buffer.stats.added, buffer.stats.released) == (5, 4)


def test_a_closed_group_leaves_with_what_it_has():
    buffer = ReplayBuffer(group_size=3, max_lag=0)
    buffer.add(make_trajectory(1, 2))
    buffer.close_group(1)
    buffer.close_group(9)  # nothing is held of it
    assert buffer.ready() == [1]
    assert names(buffer.release(1)) == [(1, 2)]
    buffer.add(make_trajectory(1, 0))  # closing ended with the release
    assert buffer.ready() == []


@pytest.mark.parametrize("version, is_stale", [(4, False), (5, False), (6, True)])
def test_the_oldest_token_decides_staleness(version, is_stale):
    """Oldest version 3 and lag 2: usable up to version 5."""
    buffer = ReplayBuffer(group_size=2, max_lag=2)
    buffer.add(make_trajectory(1, 0, version=4))
    buffer.add(make_trajectory(1, 1, version=3))
    buffer.add(make_trajectory(2, 0, version=6))
    assert buffer.drop_stale(version) == ([1] if is_stale else [])
    assert buffer.ready() == ([] if is_stale else [1])
    assert buffer.stats.stale_groups == is_stale
    assert (2, 0) in names(buffer.contents())


def test_a_member_comes_once():
    buffer = ReplayBuffer(group_size=2, max_lag=0)
    buffer.add(make_trajectory(4, 1))
    with pytest.raises(ValueError, match="group 4 already has member 1"):
        buffer.add(make_trajectory(4, 1))
    assert buffer.stats.added == 1


def test_discarded_trajectories_are_refused():
    buffer = ReplayBuffer(group_size=2, max_lag=0)
    with pytest.raises(ValueError, match=r"discarded trajectory \(worker_died\) cannot be stored"):
        buffer.add(make_trajectory(4, 1, outcome=Outcome(Status.DISCARDED, "worker_died")))
    assert buffer.contents() == []
    buffer.add(make_trajectory(4, 1, outcome=Outcome(Status.SCORED_ZERO, "turn_limit")))  # learned from


def test_forgotten_groups_are_gone():
    buffer = ReplayBuffer(group_size=1, max_lag=0)
    buffer.add(make_trajectory(4, 0))
    buffer.forget(4)
    buffer.forget(4)
    assert buffer.ready() == [] and buffer.contents() == []


def test_restored_contents_go_on_where_they_were():
    buffer, other = ReplayBuffer(group_size=2, max_lag=0), ReplayBuffer(group_size=2, max_lag=0)
    for group_id, member in [(8, 1), (3, 1), (8, 0)]:
        buffer.add(make_trajectory(group_id, member))
    other.restore(buffer.contents())
    assert other.ready() == [8]
    assert names(other.contents()) == names(buffer.contents()) == [(3, 1), (8, 0), (8, 1)]
    other.add(make_trajectory(3, 0))
    assert names(other.release(2)) == [(3, 0), (3, 1), (8, 0), (8, 1)]


@pytest.mark.parametrize("group_size, max_lag", [(0, 0), (1, -1)])
def test_impossible_sizes_are_refused(group_size, max_lag):
    with pytest.raises(ValueError, match=f"group_size={group_size} must be >= 1 and max_lag={max_lag}"):
        ReplayBuffer(group_size=group_size, max_lag=max_lag)
