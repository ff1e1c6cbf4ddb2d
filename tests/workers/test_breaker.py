"""The breaker: a common cause pauses the pool, a probe ends the pause, and nothing is lost meanwhile."""

import os
import signal
import threading
import time

import pytest

from empg_jax.workers.breaker import Breaker
from empg_jax.workers.faults import FaultPolicy, PoolError
from empg_jax.workers.pool import PoolTimeouts
from tests.workers.pools import (
    PATIENT,
    SHORT,
    act,
    both,
    counts_in,
    gather,
    open_pool,
    reset_all,
    wait_for_exit,
)

QUICK = FaultPolicy(breaker_min=3, probe=0.05, patience=60, backoff=0.01, backoff_max=0.05)


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Diary:
    """Keeps the events of a pool."""

    def __init__(self):
        self.events = []

    def __call__(self, event, /, **fields):
        self.events.append((event, fields))

    def of(self, name):
        return [fields for event, fields in self.events if event == name]


def make_breaker(**options):
    clock, diary = Clock(), Diary()
    return Breaker(FaultPolicy(**options), diary, clock), clock, diary


# --------------------------------------------------------------------------------------- the rule alone


def fail(breaker, reason="env_error", detail="", *, op="step", task=0):
    breaker.record_failure(reason, detail, op, task=task)


def test_opens_after_failures_in_a_row_or_at_a_share(caplog):
    breaker, _, diary = make_breaker(breaker_min=4, breaker_window=16, breaker_share=0.5)
    for _ in range(16):
        breaker.record_success()
    for task in range(3):
        fail(breaker, detail="line 1\nno route", task=task)
    assert not breaker.is_open
    breaker.record_answer("reset")  # resets say nothing about steps
    fail(breaker, "timeout", "slow")
    assert breaker.is_open and breaker.openings == 1
    (event,) = diary.of("breaker_open")
    assert event["reasons"] == {"env_error": 3, "timeout": 1}
    assert event["reason"] == "env_error" and event["detail"] == "line 1\nno route"
    assert caplog.messages[-1].endswith("The last one: no route")
    # Steps that succeed between them: never four in a row, but half of the episodes.
    breaker, _, _ = make_breaker(breaker_min=4, breaker_window=16, breaker_share=0.5)
    for task in range(4):
        assert not breaker.is_open
        breaker.record_answer("step")
        breaker.record_success()
        fail(breaker, task=task)
    assert breaker.is_open


def test_one_broken_task_is_no_common_cause_however_many_attempts_it_has():
    breaker, _, _ = make_breaker(breaker_min=4)
    for _ in range(16):
        fail(breaker, op="reset", task=7)
    assert not breaker.is_open
    fail(breaker, op="reset", task=8)
    assert breaker.is_open


def test_what_was_under_way_can_disprove_it():
    breaker, _, _ = make_breaker(breaker_min=3)
    for task in range(3):
        fail(breaker, task=task)
    assert breaker.is_open
    for _ in range(2):
        breaker.record_answer("step")
    fail(breaker)
    for _ in range(2):
        breaker.record_answer("step")
        breaker.record_answer("reset")
        assert not breaker.is_disproved
    breaker.record_answer("step")
    assert breaker.is_disproved


def test_tolerates_a_minority():
    breaker, _, _ = make_breaker(breaker_min=2, breaker_window=8)
    for number in range(60):
        if number % 3 == 2:
            fail(breaker)
        else:
            breaker.record_success()
    assert not breaker.is_open


def test_probes_at_once_and_then_from_time_to_time():
    breaker, clock, diary = make_breaker(breaker_min=1, probe=5.0)
    assert not breaker.take_probe() and breaker.probe_at == float("inf")
    fail(breaker)
    assert breaker.take_probe() and not breaker.take_probe()
    assert breaker.probe_at == 105.0
    clock.now += 5.0
    assert breaker.take_probe()
    clock.now += 2.5
    assert breaker.seconds == 7.5
    breaker.close()
    assert not breaker.is_open and breaker.seconds == 7.5
    assert diary.of("breaker_closed") == [{"seconds": 7.5}]
    clock.now += 100
    assert breaker.seconds == 7.5


def test_patience_ends_and_a_short_recovery_does_not_renew_it():
    breaker, clock, _ = make_breaker(breaker_min=2, patience=60.0)
    fail(breaker, detail="one")
    fail(breaker, "timeout", "two", task=1)
    clock.now += 40
    breaker.check()
    breaker.close()
    breaker.record_success()
    fail(breaker, detail="three")
    fail(breaker, detail="four", task=1)
    assert breaker.is_open
    clock.now += 19
    breaker.check()
    clock.now += 1
    with pytest.raises(PoolError, match=r"2 of the last 3 .*env_error 2.*60 s(.|\n)*last env_error: four"):
        breaker.check()
    # After enough successes it is another outage.
    breaker.close()
    for _ in range(2):
        breaker.record_success()
    fail(breaker)
    fail(breaker)
    clock.now += 59
    breaker.check()


# ------------------------------------------------------------------------------------ through the pool


@both
@pytest.mark.parametrize("at", ["reset", "step"])
def test_an_outage_ends_by_itself_and_costs_no_task(tmp_path, at):
    backend, diary = tmp_path / "backend", Diary()
    backend.touch()
    options = {"path": str(backend), "at": at}
    with open_pool("BackendEnv", num_workers=2, options=options, faults=QUICK, tell=diary) as pool:
        reset_all(pool, range(8))
        act(pool, dict.fromkeys(range(4), "x"))
        for handle in range(8):
            pool.release(handle)
        backend.unlink()
        reasons = []
        for handle in range(8):
            pool.reset(handle, seed=1, split="train", index=handle)
            (reply,) = pool.poll(0.2) or (None,)
            if reply is not None and reply.failure is None:
                (reply,) = act(pool, {handle: "x"}).values()
            if reply is not None:
                reasons.append(reply.failure.reason)
            if pool.breaker.is_open:
                break
        # The failure that opens it is already known to be nobody's.
        assert reasons == ["env_error", "env_error", "outage"] and pool.breaker.openings == 1
        for other in range(handle + 1, 8):
            pool.reset(other, seed=1, split="train", index=other)
        assert pool.poll(0.3) == [] and pool.breaker.is_open  # held, not failed
        pool.release(7)
        back = threading.Timer(0.3, backend.touch)
        back.start()
        replies = gather(pool, 7 - handle - 1)
        back.join()
        assert all(reply.failure is None for reply in replies.values())
        assert not pool.breaker.is_open and 0.3 < pool.breaker.seconds < 60
        (opened,), (closed,) = diary.of("breaker_open"), diary.of("breaker_closed")
        assert opened["reasons"] == {"env_error": 3} and "does not answer" in opened["detail"]
        assert closed["seconds"] > 0.3
        assert pool.quarantined() == [] and diary.of("task_quarantined") == []


def test_what_was_in_flight_fails_as_an_outage_and_what_works_goes_on(tmp_path):
    backend = tmp_path / "backend"
    backend.touch()
    with open_pool("BackendEnv", options={"path": str(backend)}, faults=QUICK) as pool:
        reset_all(pool, range(6))
        backend.unlink()
        reasons = [act(pool, {handle: "x"})[handle].failure.reason for handle in range(6)]
        assert reasons == ["env_error"] * 2 + ["outage"] * 4
        assert pool.stats.failures == {"env_error": 2, "outage": 4}
        backend.touch()
        pool.reset(0, seed=1, split="train", index=0)
        assert gather(pool, 1)[0].failure is None


def test_an_outage_that_hangs_ends_by_itself(tmp_path):
    backend = tmp_path / "backend"
    timeouts = PoolTimeouts(start=30, reset=30, step=0.3)
    options = {"path": str(backend), "at": "silent"}
    with open_pool("BackendEnv", options=options, faults=QUICK, timeouts=timeouts) as pool:
        reset_all(pool, range(4))
        for handle in range(3):
            act(pool, {handle: "x"})
        assert pool.breaker.is_open
        pool.reset(0, seed=1, split="train", index=0)
        assert pool.poll(1.0) == []
        backend.touch()
        assert gather(pool, 1)[0].failure is None
        assert counts_in(act(pool, {3: "x"})[3]) == 1  # it was in flight and never failed


@both
def test_workers_that_do_not_start_any_more_are_waited_for(tmp_path):
    backend, diary = tmp_path / "backend", Diary()
    backend.touch()
    options = {"path": str(backend), "at": "start"}
    with open_pool("BackendEnv", options=options, faults=QUICK, tell=diary) as pool:
        reset_all(pool, range(3))
        act(pool, dict.fromkeys(range(3), "x"))
        backend.unlink()
        (pid,) = pool.worker_pids()
        os.kill(pid, signal.SIGKILL)
        wait_for_exit(pid)
        pool.step(0, "x")
        end = time.monotonic() + 60
        while not pool.breaker.is_open and time.monotonic() < end:
            assert pool.poll(0.05) == []
        pool.reset(3, seed=1, split="train", index=3)
        assert pool.poll(0.3) == []
        backend.touch()
        replies = gather(pool, 2)
        assert counts_in(replies[0]) == 2 and counts_in(replies[3]) == 0  # nothing was lost
        assert not pool.breaker.is_open and not pool.stats.failures
        (opened,) = diary.of("breaker_open")
        assert opened["reason"] == "failed_starts" and "does not answer" in opened["detail"]


@pytest.mark.parametrize("at", ["step", "start"])
def test_patience_ends_with_the_reason(tmp_path, at):
    backend = tmp_path / "backend"
    backend.touch()
    policy = FaultPolicy(breaker_min=3, probe=0.05, patience=0.5, backoff=0.01, backoff_max=0.05)
    with open_pool("BackendEnv", options={"path": str(backend), "at": at}, faults=policy) as pool:
        reset_all(pool, range(4))
        backend.unlink()
        with pytest.raises(PoolError, match="does not answer") as caught:
            for handle in range(4):
                pool.step(handle, "crash" if at == "start" else "x")
            while not pool.breaker.is_open:
                pool.poll(0.1)
            pool.reset(4, seed=1, split="train", index=4)
            for _ in range(200):
                pool.poll(0.1)
        assert ("env_error 3" in str(caught.value)) == (at == "step")


def test_workers_that_are_lost_again_and_again_end_patience():
    policy = FaultPolicy(breaker_min=3, patience=0.5, backoff=0.01, backoff_max=0.05)
    with open_pool("UnreplayableEnv", timeouts=SHORT, faults=policy) as pool:
        with pytest.raises(PoolError, match=r"failed in their environment \(worker_died") as caught:
            for _ in range(60):
                reset_all(pool, range(4))
                act(pool, {**dict.fromkeys(range(1, 4), "sleep 1"), 0: "sleep-crash 0.3"})
        assert "exit code 7" in str(caught.value) and pool.quarantined() == []


def test_the_only_task_of_a_split_that_fails_ends_patience():
    policy = FaultPolicy(breaker_min=3, probe=0.05, patience=0.5)
    with (
        pytest.raises(PoolError, match="env_error 3"),
        open_pool(options={"tasks": 1, "broken": [0]}, faults=policy) as pool,
    ):
        for handle in range(60):
            pool.reset(handle, seed=1, split="train", index=0)
            pool.poll(0.2)


def test_a_probe_repeats_the_episode_up_to_what_failed():
    """The environment is broken at its third step only, and resets alone would not show it."""
    with open_pool(faults=QUICK, options={"length": 99}) as pool:
        reset_all(pool, range(3))
        act(pool, dict.fromkeys(range(3), "a"))
        act(pool, dict.fromkeys(range(3), "b"))
        for handle in range(3):
            act(pool, {handle: "raise"})
        pool.reset(0, seed=1, split="train", index=9)
        assert pool.poll(0.5) == [] and pool.breaker.is_open
        assert pool.stats.replayed == pool.stats.recovered == 0


def test_mere_bad_luck_costs_nothing(tmp_path):
    mark = tmp_path / "mark"
    with open_pool(faults=QUICK, options={"length": 99}) as pool:
        reset_all(pool, range(3))
        for handle in range(3):
            act(pool, {handle: f"raise-once {mark}{handle}"})
        pool.reset(0, seed=1, split="train", index=0)
        assert gather(pool, 1)[0].failure is None
        assert pool.breaker.openings == 1 and not pool.breaker.is_open


def test_a_pool_without_an_outage_never_opens():
    with open_pool(faults=FaultPolicy(breaker_min=2, breaker_window=8), timeouts=PATIENT) as pool:
        for index in range(24):
            reset_all(pool, [index])
            act(pool, {index: "raise" if index % 3 == 2 else "ok"})
            pool.release(index)
        assert pool.stats.failures == {"env_error": 8} and pool.breaker.openings == 0


@both
def test_one_dead_worker_with_64_episodes_is_one_incident():
    diary = Diary()
    policy = FaultPolicy(breaker_min=3, breaker_window=8)
    with open_pool("UnreplayableEnv", timeouts=SHORT, faults=policy, tell=diary) as pool:
        reset_all(pool, range(64))
        act(pool, dict.fromkeys(range(64), "x"))
        replies = act(pool, {0: "crash", **dict.fromkeys(range(1, 64), "sleep 0.05")})
        assert all(reply.failure.reason == "worker_died" for reply in replies.values())
        assert pool.stats.failures == {"worker_died": 64} and pool.stats.restarts == 1
        assert not pool.breaker.is_open and pool.quarantined() == []
        # They all come back, and none of their tasks is held responsible.
        for _ in range(3):
            reset_all(pool, range(64))
            act(pool, dict.fromkeys(range(64), "x"))
            for handle in range(64):
                pool.release(handle)
        assert pool.breaker.openings == 0 and pool.quarantined() == []
        assert len(diary.of("worker_restarted")) == 1


def test_two_broken_tasks_among_long_episodes_hold_nothing_up():
    """Whole groups fail at once, before any other episode has ended; the others still answer."""
    with open_pool(options={"broken": [1, 2], "length": 99}, faults=QUICK) as pool:
        for handle in range(16):
            pool.reset(handle, seed=1, split="train", index=handle // 4)
        replies = gather(pool, 16)
        assert sum(reply.failure is not None for reply in replies.values()) == 8
        for _ in range(3):
            act(pool, dict.fromkeys([*range(4), *range(12, 16)], "x"))
        pool.reset(4, seed=1, split="train", index=9)
        assert gather(pool, 1)[4].failure is None
        assert not pool.breaker.is_open


def test_a_probe_of_what_cannot_be_replayed_makes_only_the_step(tmp_path):
    mark = tmp_path / "mark"
    with open_pool("UnreplayableEnv", faults=QUICK, options={"length": 3}) as pool:
        reset_all(pool, range(3))
        act(pool, dict.fromkeys(range(3), "a"))
        act(pool, dict.fromkeys(range(3), "a"))
        for handle in range(3):
            act(pool, {handle: f"raise-once {mark}{handle}"})
        pool.reset(0, seed=1, split="train", index=0)
        assert gather(pool, 1)[0].failure is None
