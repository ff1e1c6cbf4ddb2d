"""The quarantine: only failures whose neighbors succeed count, and every quarantine ends."""

import json

from empg_jax.workers.faults import EnvFailure, FaultPolicy
from empg_jax.workers.quarantine import Quarantine
from tests.workers.pools import act, gather, open_pool, reset_all
from tests.workers.test_breaker import Diary

BROKEN = EnvFailure("env_error", "it broke")


def fail(quarantine, index, *, confirmed_by=99):
    """A failure of a task, then a success of another one."""
    quarantine.record_failure("train", index, BROKEN)
    if confirmed_by is not None:
        quarantine.record_success("train", confirmed_by)


def test_failures_in_a_row_while_others_succeed():
    diary = Diary()
    quarantine = Quarantine(FaultPolicy(quarantine_after=3), diary)
    for _ in range(2):
        fail(quarantine, 7)
    assert not quarantine.holds("train", 7)
    fail(quarantine, 7, confirmed_by=None)
    assert not quarantine.holds("train", 7)  # nobody has succeeded since
    quarantine.record_success("train", 1)
    assert quarantine.holds("train", 7) and quarantine.tasks() == [("train", 7)]
    assert diary.of("task_quarantined") == [{"split": "train", "task": 7, "reason": "env_error"}]


def test_a_success_clears_the_record_of_its_task():
    quarantine = Quarantine(FaultPolicy(quarantine_after=2))
    for _ in range(5):
        fail(quarantine, 7)
        quarantine.record_success("train", 7)
        fail(quarantine, 7, confirmed_by=7)
    assert quarantine.tasks() == []


def test_a_common_outage_fills_nothing():
    quarantine = Quarantine(FaultPolicy(quarantine_after=1))
    for index in range(20):
        fail(quarantine, index, confirmed_by=None)
    quarantine.forget_open()  # the breaker opened
    quarantine.record_success("train", 1)
    assert quarantine.tasks() == []


def test_it_expires_after_so_many_episodes_and_returns_at_the_next_failure():
    diary = Diary()
    quarantine = Quarantine(FaultPolicy(quarantine_after=3, quarantine_episodes=10), diary)
    for _ in range(3):
        fail(quarantine, 7)
    for _ in range(9):
        quarantine.record_end()
        assert quarantine.holds("train", 7)
    quarantine.record_end()
    assert not quarantine.holds("train", 7)
    assert diary.of("task_released") == [{"split": "train", "task": 7}]
    fail(quarantine, 7)
    assert quarantine.holds("train", 7)


def test_a_snapshot_goes_on_exactly():
    def play(quarantine, numbers):
        held = []
        for number in numbers:
            fail(quarantine, number % 5, confirmed_by=None if number % 3 else 9)
            held.append(quarantine.tasks())
        return held

    policy = FaultPolicy(quarantine_after=2, quarantine_episodes=7)
    whole = Quarantine(policy)
    expected = play(whole, range(60))
    first, second = Quarantine(policy), Quarantine(policy)
    found = play(first, range(31))
    second.restore(json.loads(json.dumps(first.snapshot())))
    assert found + play(second, range(31, 60)) == expected and any(expected)
    assert second.snapshot() == whole.snapshot()


def test_the_pool_refuses_a_broken_task_for_a_while_and_remembers_it():
    options, policy = {"broken": [7]}, FaultPolicy(quarantine_episodes=4)

    def play(pool, index):
        pool.reset(0, seed=0, split="train", index=index)
        reply = gather(pool, 1)[0]
        if reply.failure is None:
            act(pool, {0: "ok"})
            pool.release(0)
        return None if reply.failure is None else reply.failure.reason

    with open_pool(options=options, faults=policy) as pool:
        for _ in range(3):
            assert play(pool, 7) == "env_error"
            assert play(pool, 8) is None
        assert play(pool, 7) == "quarantined" and pool.quarantined() == [("train", 7)]
        snapshot = json.loads(json.dumps(pool.fault_snapshot()))
        pool.reset(0, seed=0, split="train", index=7)
        pool.release(0)
        assert pool.poll(0) == []
    with open_pool(options=options, faults=policy) as pool:
        pool.restore_faults(snapshot)
        assert play(pool, 7) == "quarantined"
        assert play(pool, 8) is None
        assert pool.quarantined() == [("train", 7)]
        assert play(pool, 8) is None
        assert pool.quarantined() == [] and play(pool, 7) == "env_error"


def test_failures_of_a_task_with_successes_between_are_no_broken_task():
    with open_pool() as pool:
        for action in ["raise", "raise", "ok", "raise", "raise", "ok"]:
            reset_all(pool, [1])
            act(pool, {1: action})
            pool.release(1)
            reset_all(pool, [2])
            act(pool, {2: "ok"})
            pool.release(2)
        assert pool.quarantined() == []


def test_a_task_that_cannot_be_played_needs_no_further_failure():
    diary = Diary()
    quarantine = Quarantine(FaultPolicy(quarantine_episodes=2), diary)
    for _ in range(2):
        quarantine.record_refusal("train", 7, "prompt_too_long: 9 tokens")
    assert quarantine.tasks() == [("train", 7)]
    assert diary.of("task_quarantined") == [{"split": "train", "task": 7, "reason": "prompt_too_long"}]
    quarantine.record_success("train", 1)
    assert quarantine.tasks() == []
