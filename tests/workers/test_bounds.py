"""What a worker cannot do: fill the disk or the memory, leave processes behind, see the trainer's secrets."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from empg_jax.workers import memory
from empg_jax.workers import pool as worker_pool
from empg_jax.workers.variables import make_environment
from tests.processes import is_running
from tests.workers.pools import act, both, counts_in, gather, open_pool, reset_all, wait_for_exit


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def stderr_size(pool):
    return os.fstat(pool._workers[0]._process._stderr.fileno()).st_size


def test_noisy_environment_fills_neither_pipe_nor_disk(monkeypatch):
    monkeypatch.setattr(worker_pool, "STDERR_KEEP", 10_000)
    with open_pool() as pool:
        reset_all(pool, [0])
        for turn in range(1, 120):
            assert counts_in(act(pool, {0: "noise"})[0]) == turn
        wait_until(lambda: stderr_size(pool) <= 10_000)


def test_a_flood_in_one_step_does_not_stay_and_the_last_words_do():
    with open_pool(options={"length": 99}) as pool:
        reset_all(pool, [0])
        assert counts_in(act(pool, {0: "flood 1024"})[0]) == 1
        wait_until(lambda: stderr_size(pool) < 5 << 20)
        # Also while the step still runs, and without its end.
        pool.step(0, "flood-hang 256")
        pool.poll(0)
        wait_until(lambda: pool.poll(0.05) == [] and stderr_size(pool) < 5 << 20)
    with open_pool() as pool:
        reset_all(pool, [0])
        failure = act(pool, {0: "crash"})[0].failure
        assert "last words" in failure.detail


# A child without the mark, whose parent was killed, cannot be told from others; all the rest can.
ENDS = [(action, end) for action in ("child", "orphan", "nameless") for end in ("close", "hang", "kill")][:-1]


@both
@pytest.mark.parametrize(("action", "end"), ENDS)
def test_no_process_is_left_behind(action, end):
    pool = open_pool("ParentEnv", options={"length": 99})
    try:
        reset_all(pool, [0])
        child = int(act(pool, {0: action})[0].observation)
        assert is_running(child) and os.getsid(child) == child
        (pid,) = pool.worker_pids()
        if end == "kill":
            os.kill(pid, signal.SIGKILL)
            wait_for_exit(pid)
            act(pool, {0: "child"})  # the replacement has begun
            wait_until(lambda: not is_running(child))
        elif end == "hang":
            os.kill(pid, signal.SIGSTOP)
            pool.step(0, action)
            pool.poll(0)
    finally:
        pool.close()
    wait_until(lambda: not is_running(child))


def test_no_process_is_left_behind_when_the_trainer_is_killed(tmp_path):
    script = (
        "import sys, time\n"
        "from tests.workers.pools import act, open_pool, reset_all\n"
        "pool = open_pool('ParentEnv')\n"
        "reset_all(pool, [0])\n"
        "print(act(pool, {0: 'child'})[0].observation, pool.worker_pids()[0], flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as trainer:
        child, worker = map(int, trainer.stdout.readline().split())
        assert is_running(child) and is_running(worker)
        trainer.kill()
    wait_until(lambda: not is_running(child) and not is_running(worker))


@both
def test_workers_see_no_secret_unless_it_is_named(monkeypatch):
    secrets = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "GITHUB_TOKEN")
    data = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "NLTK_DATA")
    for name in (*secrets, *data, "MY_SERVER", "LC_TIME", "http_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, f"value of {name}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with open_pool("TellingEnv", pass_env=["MY_*"]) as pool:
        told = json.loads(reset_all(pool, [0])[0].observation)
    assert not set(secrets) & set(told)
    for name in (*data, "MY_SERVER", "LC_TIME", "http_proxy", "NO_PROXY"):
        assert told[name] == f"value of {name}"
    assert told["PATH"] == os.environ["PATH"] and told["HOME"] == os.environ["HOME"]
    assert told["CUDA_VISIBLE_DEVICES"] == "" and told["PYTHONHASHSEED"] == "0"
    assert make_environment(["CUDA_VISIBLE_DEVICES"])["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_the_default_memory_limit_is_a_share_of_the_machine(monkeypatch, tmp_path):
    assert memory.machine_mb() > 512
    monkeypatch.setattr(memory, "machine_mb", lambda: 64_000.0)
    assert memory.limit_memory(8) == 4000
    assert memory.limit_memory(1000) == memory.LEAST_MB
    monkeypatch.undo()
    group = tmp_path / "memory.max"
    group.write_text("1073741824\n")
    monkeypatch.setattr(memory, "GROUPS", (str(group), str(tmp_path / "none")))
    assert memory.machine_mb() <= 1024
    group.write_text("max\n")
    assert memory.machine_mb() > 0


@both
def test_a_step_that_hangs_in_a_child_is_ended_with_it():
    with open_pool("ParentEnv", options={"length": 99}) as pool:
        reset_all(pool, range(2))
        children = [int(reply.observation) for reply in act(pool, dict.fromkeys(range(2), "child")).values()]
        pool.step(0, "child")
        assert gather(pool, 1)[0].failure is None
    wait_until(lambda: not any(map(is_running, children)))
