"""Runs that are killed again and again: whatever the moment, every group is trained on exactly once.

``KILLS`` and ``KILLED_UPDATES`` set the number of kills and of updates.
"""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from empg_jax.run.consumed import read_consumed
from tests import runs

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", "3"))
UPDATES = int(os.environ.get("KILLED_UPDATES", "8"))
# Slow environments make room for the kills; what they answer is the same.
SMALL = ["sft.updates=0", "eval.tasks=2", "checkpoint.keep=2", f"train.updates={UPDATES}"]
SLOW = "env.options.latency=0.1"
PATIENCE = 300.0  # seconds for a process to get on


def kill_tree(process):
    """SIGKILL for a process and all that it started, at once."""
    children = []
    for path in Path(f"/proc/{process.pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += map(int, path.read_text().split())
    for pid in (process.pid, *children):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def count_lines(run):
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def run_killed(run, options):
    """Starts or resumes a run ``KILLS`` times, kills it at random moments, and lets it end; counts kills."""
    generator, kills = random.Random(os.environ.get("SEED", "0")), 0
    for _ in range(KILLS):
        is_begun = (run / "config.yaml").exists()
        arguments = ["train", "--resume", run] if is_begun else runs.command(run, *options, SLOW)
        process, before, end = runs.start(arguments), count_lines(run), time.monotonic() + PATIENCE
        # Some progress first, or a run could be killed for ever; then any moment, also that of a checkpoint.
        while process.poll() is None and count_lines(run) == before:
            assert time.monotonic() < end, "no progress"
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.6))
        kills += process.poll() is None
        kill_tree(process)
    assert kills, "every process had ended before it was killed"
    runs.resume(run)


@pytest.mark.parametrize("lag", [0, 2])
def test_kills_lose_and_double_nothing(tmp_path, lag):
    run = tmp_path / "killed"
    options = [*runs.HOUSE, *SMALL, f"train.max_lag={lag}", f"rollout.deterministic={str(not lag).lower()}"]
    run_killed(run, options)
    consumed = list(read_consumed(run))
    groups = [line["group_id"] for line in consumed]
    assert len(groups) == len(set(groups)) == 2 * UPDATES
    assert [line["update"] for line in consumed] == [n // 2 + 1 for n in range(2 * UPDATES)]
    assert all(0 <= line["update"] - 1 - line["version_min"] <= lag for line in consumed)
    if lag == 0:
        whole = runs.train(tmp_path / "whole", *options)
        assert list(read_consumed(whole)) == consumed
        assert runs.lines(whole) == runs.lines(run) and runs.weights(whole) == runs.weights(run)
    else:  # no task is passed over
        assert max(groups) < 2 * (UPDATES + lag)
