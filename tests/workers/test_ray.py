"""Workers on a Ray cluster: a node that dies, a quiet terminal, and what is refused before a run begins."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from empg_jax.errors import ConfigError
from empg_jax.metrics import read_metrics
from empg_jax.run.consumed import read_consumed
from empg_jax.workers import ray_backend
from empg_jax.workers.pool import EnvPool, FaultPolicy, PoolError, PoolTimeouts
from empg_jax.workers.variables import merge_environment
from tests import runs
from tests.cages import need_cages
from tests.processes import is_running
from tests.workers.clusters import open_cluster
from tests.workers.pools import act, open_pool, reset_all, wait_for_exit

RAY = ["workers.backend=ray", "workers.num=2"]
PATIENCE = 300.0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ------------------------------------------------------------------------------- refused, nothing written


def refuse(tmp_path, *overrides):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "empg_jax", *runs.command(run, *runs.HOUSE, *overrides)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2 and not run.exists(), done.stderr
    return done.stderr


def test_ray_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(ray_backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"workers.backend=ray needs ray; .* pip install -e '.\[ray\]'"):
        ray_backend.check_ray(None)


@pytest.mark.slow
def test_an_address_where_nobody_answers_is_refused(tmp_path):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    address = f"127.0.0.1:{free_port()}"
    err = refuse(tmp_path, *RAY, f"workers.ray_address={address}")
    assert f"workers.ray_address={address}: no Ray cluster answers there" in err


@pytest.mark.parametrize("address", ["ray://node0:10001", "node0", ":6379", "node0:99999", "node0:0"])
def test_an_address_of_another_form_is_refused(address, monkeypatch):
    monkeypatch.setattr(ray_backend.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="must be HOST:PORT"):
        ray_backend.check_ray(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS={address}"):
        ray_backend.check_ray(None)


def test_a_machine_without_a_cluster_is_told_how_to_start_one():
    def init(address, **options):
        assert address == "auto"  # never a cluster of this process' own, which Ray would fork
        raise ConnectionError("Could not find any running Ray instance")

    with pytest.raises(PoolError, match=r"ray_address=null: .* start one with `ray start --head`: Could not"):
        ray_backend._connect(SimpleNamespace(init=init), None)


@pytest.mark.parametrize("key", ["ray_address=node0:6379", "ray_resources={cage: 1}"])
def test_keys_of_ray_without_ray_are_refused(key):
    with pytest.raises(ConfigError, match=r"has no effect with workers\.backend=local"):
        runs.configure(".", f"workers.{key}")


def test_the_worker_s_own_machine_decides_its_folders_and_the_trainer_what_it_names():
    own = {"PATH": "/node/bin", "HOME": "/node", "PYTHONPATH": "/node/lib/ray/thirdparty_files:/node/lib"}
    brought = {"PATH": "/bin", "HOME": "/root", "LC_TIME": "C", "KEY": "secret", "PYTHONPATH": "/code"}
    merged = merge_environment({**own, "KEY": "the node's"}, brought, ["KEY"])
    assert merged == {
        **{"PATH": "/node/bin", "HOME": "/node", "LC_TIME": "C", "KEY": "secret"},
        "PYTHONPATH": "/code:/node/lib",
    }


# ------------------------------------------------------------------------------------------- a cluster


@pytest.fixture
def two_nodes():
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with open_cluster(2) as cluster:
        yield cluster


def wait_for_lines(run, count, process):
    metrics, end = run / "metrics.jsonl", time.monotonic() + PATIENCE
    while not metrics.exists() or len(list(read_metrics(metrics))) < count:
        assert time.monotonic() < end, "no progress"
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def marked(mark):
    """The worker processes that were given this variable."""
    found = []
    for number in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{number}/cmdline").read_bytes()
            if (
                b"empg_envs.worker" in command
                and mark.encode() in Path(f"/proc/{number}/environ").read_bytes()
            ):
                found.append(int(number))
    return found


def wait_until_gone(mark):
    end = time.monotonic() + 60
    while marked(mark):
        assert time.monotonic() < end, marked(mark)
        time.sleep(0.05)


@pytest.mark.slow
def test_a_node_that_dies_costs_its_episodes_only(tmp_path, two_nodes, monkeypatch):
    run = tmp_path / "run"
    options = [*RAY, f"workers.ray_address={two_nodes.address}", "env.options.latency=0.2", "train.updates=8"]
    mark = f"OF_A_TEST={run}"
    monkeypatch.setenv(*mark.split("="))
    process = runs.start(runs.command(run, *runs.HOUSE, *options, "workers.pass_env=[OF_A_TEST]"))
    wait_for_lines(run, 2, process)
    before = marked(mark)
    two_nodes.kill_node(1)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    records = list(read_consumed(run))
    assert [record["update"] for record in records] == [update for update in range(1, 9) for _ in range(2)]
    assert len({record["group_id"] for record in records}) == len(records)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    restarts = [event for event in events if event["event"] == "worker_restarted"]
    assert len(restarts) == 1, events
    assert len(before) == 2
    wait_until_gone(mark)
    # The user's terminal shows the run, not Ray; and JAX never sees a fork.
    assert "raylet" not in out + err and "ray" not in err.lower().replace(str(run), ""), err


@pytest.mark.slow
def test_a_signal_still_ends_a_run_with_its_checkpoint(tmp_path, two_nodes):
    run = tmp_path / "run"
    options = [
        *RAY,
        f"workers.ray_address={two_nodes.address}",
        "env.options.latency=0.2",
        "train.updates=60",
    ]
    process = runs.start(runs.command(run, *runs.HOUSE, *options))
    wait_for_lines(run, 1, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM and f"--resume {run}" in err, err


@pytest.mark.slow
def test_a_trainer_that_is_killed_leaves_no_worker(tmp_path, two_nodes, monkeypatch):
    mark = f"OF_A_TEST={tmp_path}"
    monkeypatch.setenv(*mark.split("="))
    script = (
        "import sys, time\n"
        "from empg_jax.workers.ray_backend import RayCluster\n"
        "from tests.workers import pools\n"
        "pools.START = RayCluster(sys.argv[1], {'node1': 1}).start\n"
        "pool = pools.open_pool('ParentEnv', num_workers=2, pass_env=['OF_A_TEST'])\n"
        "pools.reset_all(pool, [0])\n"
        "print(pools.act(pool, {0: 'child'})[0].observation, flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, two_nodes.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        child = int(trainer.stdout.readline())
        assert len(marked(mark)) == 2 and is_running(child)
        trainer.kill()
    wait_until_gone(mark)
    wait_for_exit(child)


@pytest.mark.slow
def test_a_cage_of_swe_on_a_node_that_offers_one(two_nodes, tmp_path):
    need_cages()
    script = (
        "import sys\n"
        "from empg_jax.workers.ray_backend import RayCluster\n"
        "from tests.workers import pools\n"
        "pools.START = RayCluster(sys.argv[1], {'CPU': 1, 'node1': 1}).start\n"
        "with pools.open_named('swe', options={'tools': 'terse', 'max_turns': 7}) as pool:\n"
        "    reply = pools.reset_all(pool, [0])[0]\n"
        "    action = (reply.info.get('admissible') or ['look'])[0]\n"
        "    print(pools.act(pool, {0: action})[0].failure)\n"
    )
    command = [sys.executable, "-c", script, two_nodes.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.stdout == "None\n", done.stdout + done.stderr


@pytest.mark.slow
def test_an_actor_that_is_killed_costs_nothing_and_leaves_nothing(ray_cluster, monkeypatch):
    monkeypatch.setattr("tests.workers.pools.START", ray_cluster.start)
    with open_pool(options={"length": 99}) as pool:
        reset_all(pool, range(3))
        act(pool, dict.fromkeys(range(3), "a"))
        (pid,) = pool.worker_pids()
        with open(f"/proc/{pid}/stat") as stat:
            actor = int(stat.read().rpartition(")")[2].split()[1])
        for handle in range(3):
            pool.step(handle, "sleep 1")
        pool.poll(0.5)
        os.kill(actor, signal.SIGKILL)
        replies = {}
        while len(replies) < 3:
            replies.update({reply.handle: reply for reply in pool.poll(None)})
        assert all(reply.failure is None for reply in replies.values())
        assert pool.stats.restarts == 1 and pool.worker_pids() != [pid]
        wait_for_exit(pid)


@pytest.mark.slow
def test_resources_that_no_node_has_are_named(ray_cluster):
    cluster = ray_backend.RayCluster(None, {"cage": 1})
    options = {"timeouts": PoolTimeouts(start=2.0), "faults": FaultPolicy(start_attempts=1)}
    with pytest.raises(PoolError, match=r"not ready after 2 s; no node had {'cage': 1} free"):
        EnvPool("tests.fakes:CountingEnv", num_workers=1, start=cluster.start, **options)


@pytest.mark.slow
def test_a_node_with_another_version_is_named(ray_cluster, monkeypatch):
    monkeypatch.setattr(ray_backend, "__version__", "9.9")
    options = {"timeouts": PoolTimeouts(start=30.0), "faults": FaultPolicy(start_attempts=1)}
    with pytest.raises(PoolError, match=r"this node has empg-jax .*, the trainer 9\.9"):
        EnvPool("tests.fakes:CountingEnv", num_workers=1, start=ray_cluster.start, **options)
