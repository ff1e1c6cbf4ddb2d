"""What the tests of the pool share: pools of fakes, and whole rounds of commands."""

import time

import pytest

from empg_jax.workers.pool import EnvPool, PoolTimeouts
from empg_jax.workers.process import start_local

START = start_local  # changed by the fixture `backend`
both = pytest.mark.usefixtures("backend")  # a test that every backend must pass
PATIENT = PoolTimeouts(start=30, reset=30, step=30)
SHORT = PoolTimeouts(start=30, reset=30, step=3.0)  # a busy machine answers within this


def open_pool(env="FaultyEnv", **kwargs):
    return open_named(f"tests.fakes:{env}", **kwargs)


def open_named(env, *, timeouts=PATIENT, num_workers=1, **kwargs):
    options = kwargs.pop("options", {})
    return EnvPool(env, options, num_workers=num_workers, timeouts=timeouts, start=START, **kwargs)


def gather(pool, count):
    """Polls until ``count`` replies are there; returns them by handle."""
    replies = {}
    end = time.monotonic() + 60
    while len(replies) < count and time.monotonic() < end:
        for reply in pool.poll(1.0):
            assert reply.handle not in replies
            replies[reply.handle] = reply
    assert len(replies) == count
    return replies


def reset_all(pool, handles, *, seed=1):
    for handle in handles:
        pool.reset(handle, seed=seed, split="train", index=handle)
    return gather(pool, len(handles))


def act(pool, actions):
    """One step per handle."""
    for handle, action in actions.items():
        pool.step(handle, action)
    return gather(pool, len(actions))


def counts_in(reply):
    """The step number that a counting environment tells."""
    return int(reply.observation.split()[2])


def wait_for_exit(pid):
    """Until the kernel has ended the process (it stays a zombie of its parent)."""
    wait_for_state(pid, "Z", "X", "")


def wait_for_stop(pid):
    """Until a process that got SIGSTOP does nothing any more."""
    wait_for_state(pid, "T")


def wait_for_state(pid, *states):
    end = time.monotonic() + 10
    while state_of(pid) not in states:
        assert time.monotonic() < end
        time.sleep(0.002)


def state_of(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""
