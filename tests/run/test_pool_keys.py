"""The keys of `workers` and `faults` reach the pool."""

import json
import re
from pathlib import Path

import pytest

from empg_jax.errors import ConfigError
from empg_jax.run.sampling import make_pool
from empg_jax.workers import memory
from tests import runs
from tests.workers.pools import act, reset_all

ENV = ["env.name=null", "env.entry_point=tests.fakes:TellingEnv", "workers.num=2"]


def address_space_mb(pid):
    line = re.search(r"Max address space +(\S+)", Path(f"/proc/{pid}/limits").read_text())[1]
    return None if line == "unlimited" else int(line) >> 20


def test_variables_that_are_named_reach_an_environment_and_others_do_not(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SERVER", "there")
    monkeypatch.setenv("HF_TOKEN", "secret")
    with make_pool(runs.configure(tmp_path, *ENV, "workers.pass_env=[MY_SERVER]")) as pool:
        told = json.loads(reset_all(pool, [0])[0].observation)
    assert told["MY_SERVER"] == "there" and "HF_TOKEN" not in told


@pytest.mark.parametrize(
    ("limit", "expected"), [("300", 2 * 300 + 512 + 8 * 4), ("0", None), ("null", "share")]
)
def test_the_memory_limit(tmp_path, limit, expected):
    config = runs.configure(tmp_path, *ENV, f"workers.memory_limit_mb={limit}", "workers.lanes=4")
    if expected == "share":
        expected = 2 * memory.limit_memory(2) + 512 + 8 * 4
    with make_pool(config) as pool:
        assert [address_space_mb(pid) for pid in pool.worker_pids()] == [expected] * 2


def test_lanes_and_faults(tmp_path):
    options = ["env.entry_point=tests.fakes:FaultyEnv", "faults.breaker_min=2", "faults.probe=60"]
    with make_pool(runs.configure(tmp_path, *ENV, *options, "workers.num=1", "workers.lanes=1")) as pool:
        reset_all(pool, range(2))
        pool.step(0, "sleep 0.2")
        pool.step(1, "x")  # quick, but one lane serves one after another
        order = []
        while len(order) < 2:
            order += [reply.handle for reply in pool.poll(None)]
        assert order == [0, 1]
        reset_all(pool, range(2, 4))
        for handle in range(2, 4):
            act(pool, {handle: "raise"})
        assert pool.breaker.is_open


def test_time_outs_that_are_scored_zero_are_no_outage_and_no_fault_of_their_tasks(tmp_path):
    options = ["env.entry_point=tests.fakes:FaultyEnv", "env.timeout_outcome=zero", "workers.step_timeout=2"]
    faults = ["faults.breaker_min=2", "faults.quarantine_after=1", "faults.probe=60"]
    with make_pool(runs.configure(tmp_path, *ENV, *options, *faults)) as pool:
        reset_all(pool, range(3))
        replies = act(pool, {0: "hang", 1: "hang"})  # in two workers
        assert [reply.failure.reason for reply in replies.values()] == ["timeout"] * 2
        act(pool, {2: "x"})
        pool.release(2)  # a success of another task, which makes earlier failures count
        assert not pool.breaker.openings and pool.quarantined() == []


def test_a_wrong_value_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"workers\.lanes"):
        runs.configure(tmp_path, "workers.lanes=0")
    with pytest.raises(ConfigError, match=r"faults\.breaker_share"):
        runs.configure(tmp_path, "faults.breaker_share=1.5")
