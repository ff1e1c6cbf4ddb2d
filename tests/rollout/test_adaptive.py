"""Tasks by estimated success: the formula, the draws, and what a ledger remembers through a resume."""

import collections
import json

import numpy as np
import pytest

from empg_jax.rollout.adaptive import FLOOR, AdaptiveOrder, draw, estimate_success, weigh
from empg_jax.rollout.ledger import Ledger
from empg_jax.rollout.order import TaskOrder
from empg_jax.rollout.shares import join_cuts, take_share
from empg_jax.types import Outcome, Status
from tests.episodes import Episodes
from tests.rollout.test_ledger import take_starts

EPISODES = Episodes()
FAULTS = {"ended": 0, "in_a_row": [], "open": [], "until": []}


def make_ledger(*, tasks=24, share=(0, 1), groups=4, **options):
    order = AdaptiveOrder("train", tasks, 7, share)
    return Ledger(order, group_size=4, groups_per_update=groups, share=share, **options)


def update(ledger, version, chance):
    """Plays an update: of the four attempts at a task ``chance(task)`` are solved; returns its tasks."""
    reserved = None
    while reserved is None:
        ledger.admit(version)
        for attempt in take_starts(ledger):
            won = attempt.member < chance(attempt.task)
            names = {"task": attempt.task, "group_id": attempt.group_id, "member": attempt.member}
            turn = EPISODES.turn([1, 2], 1, version=version)
            ledger.finish(
                attempt, EPISODES.trajectory([turn], episode_return=float(won), is_success=won, **names)
            )
        reserved = ledger.reserve()
    ledger.commit(version + 1)
    return [trajectory.task for trajectory in reserved.trajectories[::4]]


def chance(task):
    """The first eight tasks are always solved, the next eight never, the others in half of the attempts."""
    return (4, 0, 2)[task // 8]


def test_the_weights_by_hand():
    assert estimate_success(0, 0) == 0.5 and weigh(0, 0) == 1.0
    assert estimate_success(8, 8) == pytest.approx(0.9) and weigh(8, 8) == pytest.approx(
        FLOOR + (1 - FLOOR) * 0.36
    )
    assert weigh(8, 0) == pytest.approx(weigh(8, 8)) and weigh(8, 4) == 1.0
    assert weigh(1e9, 1e9) == pytest.approx(FLOOR)


def test_draws_follow_the_weights():
    weights = np.array([0.0, 1.0, 3.0, 0.0])
    drawn = collections.Counter(draw(weights, (0, place)) for place in range(2000))
    assert drawn.keys() == {1, 2} and drawn[2] / 2000 == pytest.approx(0.75, abs=0.04)


def test_a_record_fades_and_tasks_in_flight_are_left_out():
    order = AdaptiveOrder("train", 3, 0)
    order.note(1, [True] * 4)
    order.note(1, [True, False, False, False])
    assert order.cut() == {"solved": [[1, 6.0, 3.0]]}
    assert {order.task_at(place, busy={0, 1}) for place in range(20)} == {2}
    assert {order.task_at(place, busy={0, 1, 2}) for place in range(60)} == {0, 1, 2}  # all are in flight


def test_tasks_that_are_always_solved_or_never_are_drawn_less():
    ledger, drawn = make_ledger(), collections.Counter()
    for version in range(200):
        drawn.update(update(ledger, version, chance))
    always, never, half = (sum(drawn[task] for task in range(low, low + 8)) for low in (0, 8, 16))
    assert always < half / 1.4 and never < half / 1.4
    assert min(drawn[task] for task in range(24)) > 5  # none starves


def test_a_host_draws_its_own_tasks_only():
    """Where none of them can be played, `Collector` must not wait for the others'."""
    assert [AdaptiveOrder("train", 7, 0, (host, 2)).num_drawn for host in (0, 1)] == [4, 3]
    assert AdaptiveOrder("train", 7, 0).num_drawn == TaskOrder("train", 7, 0).num_drawn == 7


def test_tasks_that_cannot_be_played_are_drawn_less():
    ledger, drawn = make_ledger(), collections.Counter()
    for version in range(60):
        reserved = None
        while reserved is None:
            ledger.admit(version)
            for attempt in take_starts(ledger):
                names = {"task": attempt.task, "group_id": attempt.group_id, "member": attempt.member}
                drawn[attempt.task < 12] += attempt.member == 0
                if attempt.task < 12:
                    names |= {"outcome": Outcome(Status.DISCARDED, "prompt_too_long")}
                    ledger.finish(attempt, EPISODES.trajectory([], **names))
                else:
                    turn = EPISODES.turn([1, 2], 1, version=version)
                    ledger.finish(
                        attempt, EPISODES.trajectory([turn], is_success=attempt.member < 2, **names)
                    )
            reserved = ledger.reserve()
        ledger.commit(version + 1)
    assert drawn[True] < drawn[False] / 1.5


def test_groups_that_dynamic_sampling_replaces_are_remembered():
    ledger = make_ledger(max_refills=50)
    for version in range(12):
        assert all(task >= 16 for task in update(ledger, version, chance))
    assert any(task < 8 and solved == attempts for task, attempts, solved in ledger.order.cut()["solved"])


@pytest.mark.parametrize("version", [1, 5])
def test_a_resumed_ledger_draws_the_same(version):
    whole, stopped = make_ledger(), make_ledger()
    expected = [update(whole, each, chance) for each in range(10)]
    found = [update(stopped, each, chance) for each in range(version)]
    cut, episodes = stopped.cut(version)
    again = make_ledger()
    again.restore(json.loads(json.dumps(cut)), episodes)
    found += [update(again, each, chance) for each in range(version, 10)]
    assert found == expected
    assert again.cut(10)[0] == whole.cut(10)[0]


def test_hosts_share_the_tasks_and_may_change_their_number():
    two = [make_ledger(share=(index, 2), groups=2) for index in range(2)]
    for version in range(6):
        for index, ledger in enumerate(two):
            assert all(task % 2 == index for task in update(ledger, version, chance))
    cuts = [ledger.cut(6) for ledger in two]
    joined = json.loads(json.dumps(join_cuts([values | {"faults": FAULTS} for values, _ in cuts])))
    known = sorted(record for values, _ in cuts for record in values["solved"])
    for num in (1, 2, 3):
        ledgers = [make_ledger(share=(index, num), groups=2) for index in range(num)]
        for index, ledger in enumerate(ledgers):
            ledger.restore(*take_share(joined, [], index, num))
            mine = [record for record in known if record[0] % num == index]
            assert [record for record in ledger.order.cut()["solved"] if record[0] % num == index] == mine
            assert all(task % num == index for task in update(ledger, 6, chance))
    with pytest.raises(ValueError, match="2 tasks cannot be shared by 3 hosts"):
        AdaptiveOrder("train", 2, 0, (0, 3))
