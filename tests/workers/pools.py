"""What the tests of the pool share: pools of fakes, and whole rounds of commands."""

import os
import time

from empg_jax.workers.pool import EnvPool, PoolTimeouts

PATIENT = PoolTimeouts(start=30, reset=30, step=30)
SHORT = PoolTimeouts(start=30, reset=30, step=3.0)  # a busy machine answers within this


def open_pool(env="FaultyEnv", *, timeouts=PATIENT, num_workers=1, **kwargs):
    options = kwargs.pop("options", {})
    return EnvPool(f"tests.fakes:{env}", options, num_workers=num_workers, timeouts=timeouts, **kwargs)


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
    """Until the kernel has ended the process (it stays a zombie of ours)."""
    end = time.monotonic() + 10
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        assert time.monotonic() < end
        time.sleep(0.002)
