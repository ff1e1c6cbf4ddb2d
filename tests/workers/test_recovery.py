"""What becomes of the other episodes when their worker dies: replay, snapshot, or one incident."""

import os
import signal

import pytest

from empg_envs import make_env
from empg_jax.workers.inflight import Command, Inflight
from empg_jax.workers.record import EpisodeRecord
from tests.cages import has_cages
from tests.workers.pools import SHORT, act, both, counts_in, gather, open_pool, reset_all, wait_for_exit


def kill(pool):
    (pid,) = pool.worker_pids()
    os.kill(pid, signal.SIGKILL)
    wait_for_exit(pid)


@both
def test_episodes_that_cannot_be_replayed_are_lost_at_once():
    with open_pool("UnreplayableEnv") as pool:
        reset_all(pool, range(4))
        act(pool, dict.fromkeys(range(3), "a"))
        kill(pool)
        pool.release(0)  # given up by the caller: no success
        replies = act(pool, {1: "b", 2: "b", 3: "b"})
        for reply in replies.values():
            assert reply.failure.reason == "worker_died" and "not replayable" in reply.failure.detail
        assert pool.stats.replayed == 0 and pool.stats.recovered == 0
        assert pool.stats.failures == {"worker_died": 3} and pool.stats.restarts == 1
        assert all(reply.failure is None for reply in reset_all(pool, range(4)).values())


@both
def test_a_reset_that_was_not_answered_has_nothing_to_lose():
    with open_pool("UnreplayableEnv") as pool:
        reset_all(pool, [0])
        (pid,) = pool.worker_pids()
        os.kill(pid, signal.SIGSTOP)
        pool.step(0, "a")
        pool.reset(1, seed=1, split="train", index=1)
        pool.poll(0)
        os.kill(pid, signal.SIGKILL)
        replies = gather(pool, 2)
        assert replies[0].failure.reason == "worker_died" and replies[1].failure is None


def test_a_replay_that_hangs_is_not_what_the_policy_did(tmp_path):
    with open_pool(timeouts=SHORT, timeouts_are_answers=True) as pool:
        reset_all(pool, [0])
        act(pool, {0: f"hang-again {tmp_path / 'mark'}"})
        kill(pool)
        failure = act(pool, {0: "x"})[0].failure
        assert failure.reason == "worker_died" and "replaying step" in failure.detail
        reset_all(pool, [0])  # a step of its own that hangs is
        assert act(pool, {0: "hang"})[0].failure.reason == "timeout"


@both
def test_a_snapshot_stands_for_the_replay():
    with open_pool("SnapshotEnv", timeouts=SHORT) as pool:
        reset_all(pool, range(3))
        for _ in range(5):
            act(pool, dict.fromkeys(range(3), "a"))
        replies = act(pool, {0: "b", 1: "crash", 2: "b"})
        assert replies[1].failure.reason == "worker_died"
        for handle in (0, 2):
            assert counts_in(replies[handle]) == 6
        assert "restored 1 times" in replies[2].observation
        assert pool.stats.recovered >= 1 and pool.stats.replayed == pool.stats.recovered  # one command each
        kill(pool)
        replies = act(pool, {0: "c", 2: "c"})
        assert [counts_in(replies[handle]) for handle in (0, 2)] == [7] * 2
        assert pool.stats.failures == {"worker_died": 1}


@both
def test_memory_does_not_cost_episodes_that_cannot_be_replayed():
    with open_pool("UnreplayableEnv", memory_limit_mb=150, options={"length": 10**6}) as pool:
        reset_all(pool, range(2))
        (pid,) = pool.worker_pids()
        act(pool, {0: "grow 160", 1: "a"})
        for turn in range(2, 80):
            assert counts_in(act(pool, {1: "x"})[1]) == turn
        assert pool.stats.recycled == 0 and pool.worker_pids() == [pid]  # it waits
        pool.release(0)
        pool.release(1)
        for _ in range(60):
            reset_all(pool, [2])
            pool.release(2)
            pool.poll(0)
        assert pool.stats.recycled == 1 and not pool.stats.failures


def test_environments_declare_whether_they_can_be_replayed():
    assert make_env("deepsearch", replayable=False).replayable is False
    assert make_env("deepsearch").replayable is True
    if has_cages():
        assert make_env("swe", tools="terse").replayable is True
        assert make_env("swe", tools="functions").replayable is False


# ------------------------------------------------------------------------- which commands are running


def make_inflight(*handles):
    inflight = Inflight()
    episodes = {handle: EpisodeRecord(handle, "train", handle, 0) for handle in handles}
    commands = [Command(number, episodes[handle], "step", {}, 0) for number, handle in enumerate(handles)]
    inflight.add(commands)
    return inflight, commands


def test_without_word_from_the_process_the_first_one_runs():
    inflight, commands = make_inflight(5, 6, 7)
    assert inflight.running() == commands[:1]
    inflight.pop(0)
    assert inflight.running() == commands[1:2] and len(inflight) == 2


def test_a_process_that_only_closes_environments_is_not_busy():
    inflight, (first, second) = make_inflight(5, 6)
    assert inflight.is_busy
    closing, inflight = [first.episode.make_closing(), second.episode.make_closing()], Inflight()
    commands, later = inflight.compose(closing, 0, 0.0)  # sent although their episodes are over
    inflight.add(commands)
    assert [command.op for command in commands] == ["close"] * 2 and not later and not inflight.is_busy


def test_what_runs_beside_others_is_known_and_what_waits_behind_it_does_not_run():
    inflight, commands = make_inflight(5, 5, 6, 7)
    assert inflight.begin(0, thread=1, now=10.0)
    assert inflight.running() == [commands[0], commands[2]]
    inflight.begin(2, thread=2, now=11.0)
    assert inflight.running() == [commands[0], commands[2], commands[3]]
    inflight.pop(3)
    assert inflight.running() == [commands[0], commands[2]]
    inflight.pop(0)
    inflight.begin(1, thread=1, now=12.0)
    assert inflight.running() == [commands[2], commands[1]]
    assert not inflight.begin(17, thread=1, now=12.0) and inflight.pop(17) is None


def test_each_lane_has_its_deadline():
    inflight, commands = make_inflight(5, 6, 7)

    def limit(op):
        return 10.0

    assert inflight.due(100.0, limit) == (110.0, commands[0])
    inflight.begin(0, thread=1, now=100.0)
    inflight.begin(1, thread=2, now=103.0)
    assert inflight.due(108.0, limit) == (110.0, commands[0])
    inflight.pop(0)
    assert inflight.due(108.0, limit) == (113.0, commands[1])
    inflight.forgive(60.0)
    assert inflight.due(108.0, limit) == (118.0, commands[2])
    inflight.clear()
    assert inflight.due(0.0, limit) == (float("inf"), None)


@pytest.mark.slow
@both
@pytest.mark.parametrize("lanes", [1, 8])
def test_repeated_deaths_lose_no_step(lanes):
    with open_pool("CountingEnv", lanes=lanes, options={"length": 40}) as pool:
        reset_all(pool, range(6))
        for turn in range(1, 20):
            if turn % 5 == 0:
                kill(pool)
            replies = act(pool, dict.fromkeys(range(6), f"turn {turn}"))
            assert [counts_in(replies[handle]) for handle in range(6)] == [turn] * 6
