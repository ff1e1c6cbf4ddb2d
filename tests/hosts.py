"""Several processes of ``empg-jax`` as the hosts of one run, over gloo on the CPU."""

import socket
import time

from empg_jax.metrics import read_metrics
from empg_jax.run.consumed import read_consumed
from tests import runs

PATIENCE = 600.0  # seconds for a process to get on
BOTH = [*runs.HOUSE, "mesh.data=2", "sft.updates=0", "eval.tasks=4", "rollout.deterministic=true"]
SLOW = "env.options.latency=0.2"
START = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=" + sys.argv.pop(1)
from empg_jax.cli import main
main()
"""


def free_port():
    """A port that is free, and the next one, too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def seat(port, index, num=2, timeout=30):
    address = f"hosts.coordinator=127.0.0.1:{port}"
    return [address, f"hosts.num={num}", f"hosts.index={index}", f"hosts.timeout={timeout}"]


def start(arguments, devices=1, code=START):
    return runs.start([devices, *arguments], code=code)


def start_both(arguments, *, num=2, code=START, **options):
    """Starts one process per host: two, or ``num``."""
    port = free_port()
    return [start([*arguments, *seat(port, index, num=num, **options)], code=code) for index in range(num)]


def finish(*processes):
    """Waits for all; returns (exit code, stderr) of each."""
    ended = []
    try:
        for process in processes:
            _, err = process.communicate(timeout=PATIENCE)
            ended.append((process.returncode, err))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return ended


def succeed(*processes):
    for code, err in finish(*processes):
        assert code == 0, err


def wait_for_lines(run, count, *processes):
    end = time.monotonic() + PATIENCE
    while not ((run / "metrics.jsonl").exists() and len(list(read_metrics(run / "metrics.jsonl"))) >= count):
        assert time.monotonic() < end, "no progress"
        assert all(process.poll() is None for process in processes), finish(*processes)
        time.sleep(0.05)


def check_consumed(run, updates, groups=2):
    """Every update has its groups, and every group and every task of the order comes exactly once."""
    records = list(read_consumed(run))
    assert [record["update"] for record in records] == [
        update for update in range(1, updates + 1) for _ in range(groups)
    ]
    assert len({record["group_id"] for record in records}) == len(records)
    return records
