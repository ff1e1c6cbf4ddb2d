"""The worker process, driven over its pipes as a pool would."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from empg_envs.worker import RSS_EVERY
from tests.processes import is_running

COMMAND = [sys.executable, "-m", "empg_envs.worker"]


def converse(commands, *, env="tests.fakes:FaultyEnv", options=None, memory_limit_mb=None):
    """Runs a worker over one batch; returns its first line, its replies, its stderr and exit status."""
    hello = {"env": env, "options": options or {}, "memory_limit_mb": memory_limit_mb}
    lines = "\n".join([json.dumps(hello), json.dumps(commands), ""])
    done = subprocess.run(COMMAND, input=lines, capture_output=True, text=True, timeout=60, check=False)
    first, *replies = (json.loads(line) for line in done.stdout.splitlines())
    return first, replies, done.stderr, done.returncode


def batch(*steps, handle=5):
    """A reset and steps, each a pair of op and arguments or an action."""
    commands = [("reset", {"seed": 3, "split": "train", "index": 2})]
    commands += [step if isinstance(step, tuple) else ("step", {"action": step}) for step in steps]
    return [{"id": i, "env": handle, "op": op, "args": args} for i, (op, args) in enumerate(commands)]


def test_round_trip_in_order():
    first, replies, _, status = converse(batch("a", "b"))
    assert first["ready"] and first["splits"] == {"train": 100, "test": 100} and first["rss_mb"] > 1
    assert [reply["id"] for reply in replies] == [0, 1, 2]
    assert replies[0]["observation"] == "train/2/3 step 0 after ''"
    assert replies[0]["info"]["task"] == "count to 10"
    assert replies[2] == {
        "id": 2,
        "env": 5,
        "ok": True,
        "observation": "train/2/3 step 2 after 'b'",
        "reward": 0.0,
        "terminated": False,
        "truncated": False,
        "info": {"won": False},
    }
    assert status == 0


def test_episodes_of_one_worker_do_not_mix():
    commands = batch("a", handle=1) + batch("b", "c", handle=2) + batch("d", handle=1)
    _, replies, _, _ = converse(commands)
    assert [reply["observation"].split()[2] for reply in replies] == list("01" + "012" + "01")


@pytest.mark.parametrize(
    ("action", "kind", "error"),
    [
        ("raise", "exception", "ValueError: the environment broke"),
        ("exit", "exception", "SystemExit: 3"),
        ("input", "exception", "EOFError"),
        ("garbage observation", "garbage", "observation is int 3; expected str"),
        ("garbage reward", "garbage", "reward is float nan; expected a finite number"),
        ("garbage flag", "garbage", "terminated is str 'no'; expected bool"),
        ("garbage tuple", "garbage", "step returned tuple"),
        ("garbage info", "garbage", "info is not JSON-able: info['env'] is tests.fakes.FaultyEnv"),
        ("garbage array", "garbage", "info is not JSON-able: info['seen'][0]['at'] is numpy.ndarray array("),
        ("garbage won", "garbage", "info['won'] is str 'False'; expected bool"),
        ("garbage milestone", "garbage", "info['milestone'] is str 'False'; expected bool"),
        (
            "garbage metrics none",
            "garbage",
            "info['metrics']['x'] is NoneType None; expected a finite number",
        ),
        ("garbage metrics list", "garbage", "info['metrics'] is list [1.0]; expected a dict of numbers"),
        ("garbage metrics word", "garbage", "info['metrics']['x'] is str 'high'"),
        ("garbage metrics nan", "garbage", "info['metrics']['x'] is float nan"),
        ("garbage answer", "garbage", "info['known_answer'] is str 'Oslo'; expected two texts"),
        ("garbage text", "garbage", r"observation has the character '\ud83d', which is half of one"),
        ("garbage word", "garbage", r"info has the character '\udc80', which is half of one"),
        ("garbage words", "exception", r"ValueError: half \udc80 of a text"),
        ("garbage size", "garbage", "at most"),
    ],
)
def test_failure_is_data_and_costs_one_episode(action, kind, error):
    commands = batch("x", handle=1) + batch(action, "y", handle=2) + batch("z", handle=2)
    commands.append({"id": 9, "env": 1, "op": "step", "args": {"action": "w"}})
    _, replies, _, status = converse(commands)
    failed, after, again, _, neighbor = replies[3:]
    assert not failed["ok"] and failed["kind"] == kind and error in failed["error"]
    # The broken instance is gone; a reset builds another one; the neighbor did not notice.
    assert "reset it first" in after["error"]
    assert again["ok"] and neighbor["observation"] == "train/2/3 step 2 after 'w'"
    assert status == 0


def test_scalars_of_numpy_arrive_as_plain_ones():
    _, replies, _, _ = converse(batch("numpy"))
    expected = {"won": True, "milestone": True, "count": 3, "metrics": {"share": 0.5}}
    assert replies[-1]["info"] == expected and replies[-1]["info"]["won"] is True


def test_prints_cannot_disturb_the_protocol():
    _, replies, stderr, _ = converse(batch("noise", "x"))
    assert [reply["ok"] for reply in replies] == [True] * 3
    assert "raw noise" in stderr and stderr.count('"ok": true') == 50


def test_expert_close_and_unknown_op():
    commands = batch("x", ("expert", {}), ("close", {}), "y", ("dance", {}))
    _, replies, _, _ = converse(commands)
    assert replies[2]["action"] == "count 2"
    assert replies[3]["ok"] and "reset it first" in replies[4]["error"]
    assert "unknown op 'dance'" in replies[5]["error"]


def test_loads_neither_jax_nor_empg_jax():
    _, replies, _, _ = converse([*batch("x"), {"id": 7, "op": "modules"}])
    modules = replies[-1]["modules"]
    assert "empg_envs" in modules
    assert not {"jax", "jaxlib", "flax", "numpy", "empg_jax"} & set(modules)


def test_resident_memory_is_reported_now_and_then():
    _, replies, _, _ = converse(batch("grow 64", *["x"] * (2 * RSS_EVERY)))
    reports = [reply["rss_mb"] for reply in replies if "rss_mb" in reply]
    assert len(reports) == 2 and reports[0] > 64


def test_mapped_files_are_no_memory_of_the_workers_own(tmp_path):
    """An array that all workers share may be larger than the limit of each; what is read does not count."""
    path = tmp_path / "vectors.npy"  # 3 GiB, sparse
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(1 << 20, 768)).flush()
    code = (
        "import resource, sys, numpy\n"
        "from empg_envs.deepsearch.vectors_numpy import VectorFile\n"
        "from empg_envs.worker import resident_mb\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, resource.RLIM_INFINITY))\n"
        "file = VectorFile(sys.argv[1], piece=1 << 10)\n"
        "before = resident_mb()\n"
        "numpy.sum(file._vectors[: 1 << 17])\n"
        "print(resident_mb() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64  # of 384 MiB that were read


def test_memory_limit_turns_a_leap_into_an_error():
    _, replies, _, _ = converse(batch("grow 2000"), memory_limit_mb=1000)
    assert replies[1]["error"].startswith("MemoryError")


@pytest.mark.parametrize(
    ("env", "options", "message"),
    [
        ("houshold", {}, "did you mean 'household'"),
        (
            "tests.fakes:CountingEnv",
            {"colour": 1},
            "CountingEnv has no option 'colour'; its options are length, tasks, pad",
        ),
        ("no_such_module:Env", {}, "cannot import"),
    ],
)
def test_bad_environment_is_a_fatal_first_line(env, options, message):
    first, replies, _, status = converse([], env=env, options=options)
    assert message in first["fatal"] and not replies and status == 1


def start_worker():
    worker = subprocess.Popen(
        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    worker.stdin.write(b'{"env":"tests.fakes:FaultyEnv"}\n')
    worker.stdin.flush()
    assert b"ready" in worker.stdout.readline()
    return worker


def test_ignores_ctrl_c_and_ends_with_stdin():
    with start_worker() as worker:
        worker.send_signal(signal.SIGINT)
        worker.stdin.write(json.dumps(batch("x")).encode() + b"\n")
        worker.stdin.flush()
        assert json.loads(worker.stdout.readline())["ok"]
        worker.stdin.close()
        assert worker.wait(timeout=10) == 0


def test_ends_with_its_parent_even_while_an_environment_hangs():
    # The parent of the hanging worker is killed with its pipes still open elsewhere (here: in us).
    script = f"""
import json, os, subprocess, sys, time
worker = subprocess.Popen({COMMAND!r}, stdin=0, stdout=subprocess.PIPE)
worker.stdout.readline(); worker.stdout.readline()
print(worker.pid, flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        lines = ['{"env":"tests.fakes:FaultyEnv"}', json.dumps(batch("hang")), ""]
        parent.stdin.write("\n".join(lines).encode())
        parent.stdin.flush()
        pid = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        assert wait_until(lambda: not is_running(pid), seconds=10)


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
