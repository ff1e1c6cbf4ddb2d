"""A run that is asked to stop ends in time, wherever it is, and says from where it can go on."""

import os
import signal
import time

import pytest

from empg_jax.metrics import read_metrics
from tests import runs

pytestmark = pytest.mark.slow

# From update 2 on the main thread is in C code for minutes, where no handler of Python is called.
STUCK = """
import hashlib
from empg_jax import cli, trainer

real = trainer.check_steps
def check_steps(parts, run, *rest):
    if run.update == 2:
        (parts.run_dir / "stuck").touch()
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2**31 - 1)
    real(parts, run, *rest)
trainer.check_steps = check_steps
cli.main()
"""
SLOW_READER = """
import pathlib, sys, time
from empg_jax import cli
from empg_jax.sft import chat_data

real = chat_data.tokenize_conversation
def tokenize(*arguments):
    pathlib.Path(MARK).touch()
    time.sleep(0.2)
    return real(*arguments)
chat_data.tokenize_conversation = tokenize
cli.main()
"""
SMALL = [*runs.HOUSE, "sft.updates=0", "eval.tasks=1"]


def _wait_for(process, *paths, seconds=180):
    end = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"the run ended or hung ({process.returncode}): {process.communicate()[1]}")
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("signals", "grace"), [([signal.SIGTERM], 2), ([signal.SIGINT, signal.SIGTERM], 900)]
)
def test_a_run_that_cannot_stop_is_ended_at_the_deadline_or_by_a_second_signal(tmp_path, signals, grace):
    run = tmp_path / "run"
    process = runs.start(runs.command(run, *SMALL, f"checkpoint.grace={grace}"), code=STUCK)
    try:
        _wait_for(process, run / "stuck", run / "checkpoints" / "1")
        for number in signals:
            process.send_signal(number)
            time.sleep(0.5)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    why = f"no stopping point within {grace} s" if len(signals) == 1 else "asked a second time"
    assert process.returncode == 128 + signals[0], err
    assert err.splitlines()[-1] == (
        f"stopped by signal {signals[0]:d} ({why}): the newest checkpoint is 1; go on with: empg-jax train "
        f"--resume {run}"
    )
    assert "Traceback" not in err
    (event,) = read_metrics(run / "events.jsonl")
    assert (event["event"], event["signal"], event["checkpoint"]) == ("stop_forced", signals[0], 1)
    runs.resume(run)
    assert [line["update"] for line in runs.lines(run)] == [1, 2, 3]


def test_a_stop_while_chat_files_are_read_leaves_nothing(tmp_path):
    chat, run, mark = tmp_path / "chat.jsonl", tmp_path / "run", tmp_path / "mark"
    line = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    chat.write_text(line * 3000)  # ten minutes
    options = [*SMALL, "model.tokenizer=bytes", f"sft.data={chat}", "sft.updates=1"]
    code = f"MARK = {os.fspath(mark)!r}\n{SLOW_READER}"
    process = runs.start(runs.command(run, *options), code=code)
    try:
        _wait_for(process, mark)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert err.splitlines()[-1] == "stopped by signal 15; nothing was written" and "Traceback" not in err
    assert not run.exists()
