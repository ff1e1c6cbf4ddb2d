"""The environment pool: order, recovery by replay, starts, memory, clean ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from empg_jax.workers.pool import FaultPolicy, PoolError, PoolTimeouts
from tests.workers.pools import (
    SHORT,
    act,
    both,
    counts_in,
    gather,
    open_named,
    open_pool,
    reset_all,
    wait_for_exit,
    wait_for_stop,
)


@both
def test_round_trip():
    with open_pool() as pool:
        assert pool.splits == {"train": 100, "test": 100}
        assert pool.poll(None) == []  # nothing to wait for
        pool.reset(4, seed=9, split="test", index=3)
        (reply,) = pool.poll(None)
        assert (reply.handle, reply.op, reply.failure) == (4, "reset", None)
        assert reply.observation == "test/3/9 step 0 after ''"
        assert reply.info == {"task": "count to 10", "won": False}
        for turn in range(1, 11):
            pool.step(4, "go")
            (reply,) = pool.poll(None)
            assert reply.observation == f"test/3/9 step {turn} after 'go'"
            assert (reply.op, reply.reward, reply.terminated) == ("step", float(turn == 10), turn == 10)
        pool.release(4)
        assert pool.stats.commands == pool.stats.replies == 11


@both
def test_no_step_is_lost_or_doubled():
    handles, rounds = 20, 500
    with open_pool("CountingEnv", num_workers=2, options={"length": 10**9}) as pool:
        reset_all(pool, range(handles))
        for handle in range(handles):
            pool.step(handle, "0")
        done = dict.fromkeys(range(handles), 0)
        while pool.stats.replies < handles * (rounds + 1):
            for reply in pool.poll(None):
                done[reply.handle] += 1
                assert reply.observation == (
                    f"train/{reply.handle}/1 step {done[reply.handle]} after '{done[reply.handle] - 1}'"
                )
                if done[reply.handle] < rounds:
                    pool.step(reply.handle, str(done[reply.handle]))
        assert set(done.values()) == {rounds}
        assert pool.poll(0.05) == []


@both
def test_large_messages_both_ways_do_not_deadlock():
    # Far more than a pipe holds, in both directions, before anybody reads.
    with open_pool("CountingEnv", options={"pad": 300_000}) as pool:
        handles = range(8)
        reset_all(pool, handles)
        replies = act(pool, {handle: "a" * 400_000 for handle in handles})
        assert all(len(reply.observation) > 700_000 for reply in replies.values())


@both
def test_parent_that_is_away_longer_than_the_deadline_blames_nobody():
    # The worker blocks on a full pipe meanwhile, so its last answers were not even begun.
    with open_pool("CountingEnv", timeouts=SHORT, options={"pad": 100_000}) as pool:
        handles = range(6)
        reset_all(pool, handles)
        for handle in handles:
            pool.step(handle, "x")
        assert pool.poll(0) == []
        time.sleep(SHORT.step + 0.5)
        assert all(reply.failure is None for reply in gather(pool, 6).values())


@both
def test_misuse_is_refused():
    with open_pool() as pool:
        with pytest.raises(
            ValueError, match=r"unknown split 'trian' \(did you mean train\?\); known: test, train"
        ):
            pool.reset(0, seed=0, split="trian", index=0)
        with pytest.raises(ValueError, match="'train' has 100 tasks"):
            pool.reset(0, seed=0, split="train", index=100)
        with pytest.raises(ValueError, match="no live episode"):
            pool.step(0, "x")
        pool.reset(0, seed=0, split="train", index=0)
        with pytest.raises(ValueError, match="release it first"):
            pool.reset(0, seed=0, split="train", index=0)
        with pytest.raises(ValueError, match="still waits"):
            pool.step(0, "x")
    with pytest.raises(ValueError, match="at least 1"):
        open_pool(num_workers=0)
    with pytest.raises(PoolError, match="closed"):
        pool.poll(0)


@both
@pytest.mark.parametrize(
    ("action", "reason", "detail"),
    [
        ("raise", "env_error", "ValueError: the environment broke"),
        ("exit", "env_error", "SystemExit"),
        ("garbage reward", "env_garbage", "reward is float nan"),
        ("crash", "worker_died", "exit code 7; last lines of its stderr:\nlast words"),
        ("kill", "worker_died", "killed by SIGKILL"),
        ("hang", "timeout", "no answer after 3 s; in step {'action': 'hang'} of train/1"),
    ],
)
def test_broken_environment_costs_its_episode_only(action, reason, detail):
    with open_pool(timeouts=SHORT) as pool:
        reset_all(pool, range(4))
        act(pool, {0: "a", 2: "a"})
        replies = act(pool, {0: "b", 1: action, 2: "b", 3: "b"})
        assert replies[1].failure.reason == reason
        assert detail in replies[1].failure.detail
        assert [counts_in(replies[handle]) for handle in (0, 2, 3)] == [2, 2, 1]
        # The handle is free again, the others go on.
        pool.release(1)
        pool.reset(1, seed=2, split="train", index=1)
        assert gather(pool, 1)[1].failure is None
        replies = act(pool, dict.fromkeys(range(4), "c"))
        assert [counts_in(replies[handle]) for handle in range(4)] == [3, 1, 3, 2]
        assert pool.stats.failures == {reason: 1}
        assert pool.stats.restarts == (reason in ("worker_died", "timeout"))


@both
def test_a_hang_names_the_line_that_hangs():
    with open_pool(timeouts=SHORT) as pool:
        reset_all(pool, [0])
        assert "fakes.py" in act(pool, {0: "hang"})[0].failure.detail


@both
def test_idle_worker_that_is_killed_costs_nothing():
    with open_pool(num_workers=2) as pool:
        reset_all(pool, range(6))
        act(pool, dict.fromkeys(range(6), "a"))
        before = pool.worker_pids()
        os.kill(before[0], signal.SIGKILL)
        wait_for_exit(before[0])
        replies = act(pool, dict.fromkeys(range(6), "b"))
        assert [counts_in(replies[handle]) for handle in range(6)] == [2] * 6
        assert pool.stats.restarts == 1 and pool.stats.recovered == 3 and not pool.stats.failures
        assert pool.stats.replayed == 3 * 2
        assert before[1] in pool.worker_pids() and before[0] not in pool.worker_pids()


@both
def test_commands_that_a_dead_worker_never_read_blame_nobody():
    with open_pool() as pool:
        reset_all(pool, range(3))
        (pid,) = pool.worker_pids()
        os.kill(pid, signal.SIGSTOP)
        wait_for_stop(pid)  # from here on it reads nothing
        for handle in range(3):
            pool.step(handle, "x")
        assert pool.poll(0) == []
        os.kill(pid, signal.SIGKILL)
        assert [counts_in(reply) for reply in gather(pool, 3).values()] == [1] * 3


@both
def test_repeated_kills_in_mid_episode_lose_no_step():
    with open_pool("CountingEnv", num_workers=2, options={"length": 40}) as pool:
        reset_all(pool, range(8))
        for turn in range(1, 41):
            if turn % 10 == 0:
                os.kill(pool.worker_pids()[0], signal.SIGKILL)
                wait_for_exit(pool.worker_pids()[0])
            replies = act(pool, dict.fromkeys(range(8), f"turn {turn}"))
            for handle, reply in replies.items():
                assert reply.failure is None
                assert reply.observation == f"train/{handle}/1 step {turn} after 'turn {turn}'"
        assert all(reply.terminated and reply.reward == 1.0 for reply in replies.values())
        assert pool.stats.recovered == 16


@both
def test_nondeterministic_environment_is_found_out():
    with open_pool("NondeterministicEnv") as pool:
        reset_all(pool, range(2))
        act(pool, {0: "a"})
        (pid,) = pool.worker_pids()
        os.kill(pid, signal.SIGKILL)
        wait_for_exit(pid)
        failure = act(pool, {0: "b"})[0].failure
        assert failure.reason == "nondeterministic" and "gave something else" in failure.detail
        assert pool.stats.recovered == 0


@both
def test_a_replay_that_hangs_costs_its_episode(tmp_path):
    with open_pool(timeouts=SHORT) as pool:
        reset_all(pool, range(3))
        act(pool, {0: f"hang-again {tmp_path / 'mark'}", 2: "a"})
        replies = act(pool, {1: "crash", 0: "b", 2: "b"})
        assert replies[1].failure.reason == replies[0].failure.reason == "worker_died"
        assert "no answer after 3 s; replaying step {'action': 'hang-again" in replies[0].failure.detail
        assert counts_in(replies[2]) == 2 and pool.stats.restarts == 2


@both
def test_released_episode_never_answers():
    with open_pool(timeouts=SHORT) as pool:
        reset_all(pool, range(2))
        pool.step(0, "sleep 0.05")
        pool.poll(0)
        pool.release(0)
        pool.release(0)
        pool.reset(0, seed=5, split="train", index=7)
        assert gather(pool, 1)[0].observation == "train/7/5 step 0 after ''"
        # A released episode that hangs is still ended, at nobody's cost.
        pool.step(0, "hang")
        pool.poll(0)
        pool.release(0)
        pool.reset(0, seed=5, split="train", index=7)
        assert counts_in(act(pool, {1: "x"})[1]) == 1  # the neighbor does not wait
        assert pool.stats.restarts == 0
        assert gather(pool, 1)[0].observation == "train/7/5 step 0 after ''"
        assert not pool.stats.failures and pool.stats.restarts == 1


@both
@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("tests.fakes:UnstartableEnv", "3 times in a row(.|\n)*exit code 4(.|\n)*no licence found"),
        ("tests.fakes:Countingenv", "did you mean 'CountingEnv'"),
        ("houshold", "did you mean 'household'"),
    ],
)
def test_worker_that_does_not_start_is_named(env, message):
    with pytest.raises(PoolError, match=message):
        open_named(env)


@both
def test_worker_that_starts_at_the_third_attempt(tmp_path):
    options = {"path": str(tmp_path / "attempts"), "failures": 2}
    with open_pool("FlakyStartEnv", options=options) as pool:
        assert reset_all(pool, [0])[0].failure is None
        assert pool.stats.starts == 3
    options = {"path": str(tmp_path / "more"), "failures": 3}
    with pytest.raises(PoolError, match="3 times in a row; the last time: ConnectionError: attempt 3"):
        open_pool("FlakyStartEnv", options=options)


def test_waits_between_barren_starts_double_up_to_a_bound():
    policy = FaultPolicy(backoff=0.1, backoff_max=0.5)
    assert [policy.wait_before_start(barren) for barren in range(6)] == [0.0, 0.1, 0.2, 0.4, 0.5, 0.5]


def test_worker_that_is_slow_to_start_is_named():
    policy = FaultPolicy(start_attempts=1)
    with pytest.raises(PoolError, match=r"not ready after 0\.5 s(.|\n)*fakes.py"):
        open_pool("SlowEnv", timeouts=PoolTimeouts(start=0.5), options={"start": 60}, faults=policy)


@both
def test_growing_worker_is_replaced_between_commands():
    with open_pool(memory_limit_mb=150) as pool:
        reset_all(pool, range(2))
        (pid,) = pool.worker_pids()
        act(pool, {0: "grow 100", 1: "a"})
        act(pool, {0: "grow 100"})
        pool.release(0)
        for turn in range(2, 60):
            assert counts_in(act(pool, {1: "x"})[1]) == turn
        assert pool.stats.recycled == 1 and pool.worker_pids() != [pid]
        assert not pool.stats.failures and pool.stats.recovered == 1


@both
def test_memory_leap_is_an_error_and_memory_limit_below_start_is_named():
    with open_pool(memory_limit_mb=200) as pool:
        reset_all(pool, range(2))
        replies = act(pool, {0: "grow 4000", 1: "a"})
        assert replies[0].failure.detail.startswith("MemoryError")
        assert counts_in(replies[1]) == 1 and counts_in(act(pool, {1: "b"})[1]) == 2
        assert pool.stats.recycled == 1
    with pytest.raises(PoolError, match="a fresh worker already holds"):
        open_pool(memory_limit_mb=1)


@both
@pytest.mark.parametrize("is_hanging", [False, True])
def test_close_leaves_no_process(is_hanging):
    pool = open_pool(num_workers=2)
    reset_all(pool, range(2))
    if is_hanging:
        pool.step(0, "hang")
        pool.poll(0.1)
    pids = pool.worker_pids()
    start = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - start < 15  # the hang would last an hour
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):  # neither running nor a zombie
            os.kill(pid, 0)


def test_workers_find_modules_of_the_working_directory_and_fixed_hashes(tmp_path):
    (tmp_path / "my_env.py").write_text(
        "from tests.fakes import CountingEnv\n"
        "class MyEnv(CountingEnv):\n"
        "    def _observe(self, action):\n"
        "        return ' '.join({'a', 'b', 'c', 'd', 'e', 'f', 'g'})\n"
    )
    script = (
        "from empg_jax.workers.pool import EnvPool\n"
        "import sys\n"
        "with EnvPool('my_env:MyEnv', num_workers=1) as pool:\n"
        "    pool.reset(0, seed=0, split='train', index=0)\n"
        "    print(pool.poll(None)[0].observation)\n"
        "assert not {'jax', 'multiprocessing'} & set(sys.modules)\n"
    )
    here = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    outputs = {
        subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[0] = {here!r}\n{script}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    }
    assert len(outputs) == 1 and len(outputs.pop().split()) == 7
