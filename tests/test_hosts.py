"""Two processes of ``empg-jax train`` as two hosts of one run, over gloo on the CPU."""

import json
import os
import re
import signal
import time

import pytest

from empg_jax.metrics import read_metrics
from empg_jax.run.consumed import read_consumed
from tests import runs
from tests.hosts import (
    BOTH,
    PATIENCE,
    SLOW,
    START,
    check_consumed,
    finish,
    free_port,
    seat,
    start,
    start_both,
    succeed,
    wait_for_lines,
)

pytestmark = pytest.mark.slow


def check_equal(one, other, updates):
    """Both runs are the same to the rounding of sums over devices."""
    mine, theirs = (list(read_metrics(run / "metrics.jsonl")) for run in (one, other))
    assert [line["update"] for line in theirs] == list(range(1, updates + 1))
    for line, same in zip(mine, theirs, strict=True):
        for name in ("loss", "entropy", "grad_norm", "advantage_std", "success_rate", "tokens_sampled"):
            assert same[name] == pytest.approx(line[name], abs=1e-4), name
    assert any(line["grad_norm"] > 0.01 for line in mine)
    assert (one / "consumed.jsonl").read_text() == (other / "consumed.jsonl").read_text()
    first, second = (json.loads((run / "summary.json").read_text()) for run in (one, other))
    for name in ("eval_wins_before", "eval_wins_after", "tokens_sampled", "trajectories"):
        assert first[name] == second[name], name


def test_two_hosts_equal_one(tmp_path):
    updates = "train.updates=6"
    succeed(*start_both(runs.command(tmp_path / "two", *BOTH, updates)))
    runs.train(tmp_path / "one", *BOTH, updates)
    check_equal(tmp_path / "one", tmp_path / "two", 6)
    # The folder may go on with other hosts, so it does not hold these.
    assert "coordinator: null" in (tmp_path / "two" / "config.yaml").read_text()


@pytest.mark.long
def test_four_hosts_equal_one(tmp_path):
    """Weights are split over two pairs of hosts, and copied over the pairs."""
    options = [*BOTH, "mesh.data=2", "mesh.fsdp=2", "rollout.tasks_per_update=4", "train.updates=2"]
    succeed(*start_both(runs.command(tmp_path / "four", *options), num=4, timeout=120))
    runs.train(tmp_path / "one", *options)
    check_equal(tmp_path / "one", tmp_path / "four", 2)
    check_consumed(tmp_path / "four", 2, groups=4)


@pytest.mark.long
def test_overlap_on_two_hosts(tmp_path):
    run = tmp_path / "run"
    options = [*BOTH[:-1], "train.max_lag=1", "mesh.data=1", "mesh.fsdp=2", "train.updates=4"]
    succeed(*start_both(runs.command(run, *options)))
    check_consumed(run, 4)
    assert all(line["lag_max"] <= 1 for line in read_metrics(run / "metrics.jsonl"))


def test_a_signal_to_one_stops_all_and_one_goes_on(tmp_path):
    run = tmp_path / "run"
    both = start_both(runs.command(run, *BOTH, SLOW, "train.updates=8"))
    wait_for_lines(run, 2, *both)
    both[1].send_signal(signal.SIGTERM)
    for code, err in finish(*both):
        assert code == 128 + signal.SIGTERM, err
        assert f"go on with: empg-jax train --resume {run}" in err
    made = len(list(read_consumed(run))) // 2
    assert 2 <= made < 8
    # The same run goes on in one process, with both devices there.
    succeed(start(["train", "--resume", run], devices=2))
    records = check_consumed(run, 8)
    assert [record["group_id"] for record in records] == list(range(16))


@pytest.mark.long
def test_one_becomes_two(tmp_path):
    run = tmp_path / "run"
    succeed(start(runs.command(run, *BOTH, "train.updates=2"), devices=2))
    succeed(*start_both(["train", "--resume", run, "train.updates=5"]))
    records = check_consumed(run, 5)
    assert [record["group_id"] for record in records] == list(range(10))
    assert json.loads((run / "summary.json").read_text())["updates"] == 5


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_killed_host_ends_the_other_and_all_go_on(tmp_path, killed):
    run = tmp_path / "run"
    both = start_both(runs.command(run, *BOTH, SLOW, "train.updates=6"))
    wait_for_lines(run, 2, *both)
    both[killed].kill()
    began = time.monotonic()
    (code, err), other = finish(both[1 - killed], both[killed])
    assert time.monotonic() - began < 60
    assert code == 1 and other[0] == -signal.SIGKILL, err
    assert re.search(rf"error: host {killed} \(.*\) is gone.*start all hosts again with: .*{run}", err), err
    succeed(*start_both(["train", "--resume", run]))
    records = check_consumed(run, 6)
    assert [record["group_id"] for record in records] == list(range(12))


def test_a_stuck_host_is_named_in_time(tmp_path):
    run, timeout = tmp_path / "run", 20
    both = start_both(runs.command(run, *BOTH, SLOW, "train.updates=30"), timeout=timeout)
    wait_for_lines(run, 1, *both)
    both[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        ((code, err),) = finish(both[0])
    finally:
        both[1].kill()
        both[1].communicate()
    assert time.monotonic() - began < timeout + 40
    message = rf"error: host 1 \(.*\) did not answer for {timeout} s \(hosts.timeout\).*start all hosts again"
    assert code == 1 and re.search(message, err), err


# --------------------------------------------------------------------------------------- bad input


def refuse(*processes):
    """Both processes refuse; returns their messages."""
    ended = finish(*processes)
    assert [code for code, _ in ended] == [2] * len(ended), ended
    return [err for _, err in ended]


def test_different_configurations_are_refused(tmp_path):
    run, port = tmp_path / "run", free_port()
    command = runs.command(run, *BOTH)
    errors = refuse(start([*command, *seat(port, 0)]), start([*command, "seed=7", *seat(port, 1)]))
    for err in errors:
        assert "differs from host 0: seed=7 (host 0: 0)" in err
    assert not run.exists()


def test_an_index_used_twice_is_refused(tmp_path):
    port = free_port()
    command = runs.command(tmp_path / "run", *BOTH)
    errors = refuse(*(start([*command, *seat(port, index, num=3)]) for index in (0, 1, 1)))
    assert all("hosts.index=1 is used twice" in err for err in errors)


def test_a_missing_host_is_named(tmp_path):
    command = runs.command(tmp_path / "run", *BOTH)
    (err,) = refuse(start([*command, *seat(free_port(), 0, timeout=2)]))
    assert "host 1 of 2 did not come within 2 s" in err
    (err,) = refuse(start([*command, *seat(free_port(), 1, timeout=2)]))
    assert "nobody answers within 2 s" in err and "hosts.index=0" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["rollout.tasks_per_update=3"],
            "rollout.tasks_per_update=3 groups cannot be shared by 2 hosts evenly",
        ),
        (["mesh.data=1"], "mesh.data=1 needs 1 devices, but 2 hosts with 1 each"),
        (["mesh.data=4"], "mesh.data=4 needs 4 devices, but 2 hosts with 1 each"),
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path, options, message):
    run = tmp_path / "run"
    for err in refuse(*start_both(runs.command(run, *BOTH, *options))):
        assert message in err
    assert not run.exists()


def test_a_folder_that_one_host_does_not_see_is_refused(tmp_path):
    port = free_port()
    # A relative folder of the first host only: the second one lives elsewhere.
    command = [
        sign if not sign.startswith("run_dir=") else "run_dir=null" for sign in runs.command(".", *BOTH)
    ]
    code = f"import os; os.chdir(os.environ['HERE'])\n{START}"
    processes = []
    for index in (0, 1):
        folder = tmp_path / str(index)
        folder.mkdir()
        os.environ["HERE"] = str(folder)
        hide = "" if index == 0 else "import pathlib; pathlib.Path.exists = lambda self, **kw: False\n"
        processes.append(runs.start([1, *command, *seat(port, index)], code=hide + code))
    del os.environ["HERE"]
    for err in refuse(*processes):
        assert "host 1 does not see the run folder" in err


# ------------------------------------------------------------------------------------------ failures


def test_an_error_on_one_host_ends_all_with_a_checkpoint(tmp_path):
    run, port = tmp_path / "run", free_port()
    options = ["env.options.backend=backend", "faults.patience=2", "train.updates=30", "checkpoint.every=30"]
    processes = []
    for index in (0, 1):
        here = tmp_path / str(index)
        here.mkdir()
        (here / "backend").touch()
        code = f"import os; os.chdir({str(here)!r})\n{START}"
        command = [1, *runs.command(run, *BOTH, SLOW, *options), *seat(port, index)]
        processes.append(runs.start(command, code=code))
    wait_for_lines(run, 2, *processes)
    (tmp_path / "1" / "backend").unlink()
    (first, other), (second, err) = finish(*processes)
    assert first == second == 1, (other, err)
    assert "host 1 failed: " in other and "--resume" in other
    made = len(list(read_consumed(run))) // 2
    assert made >= 2 and (run / "checkpoints" / str(made)).exists()


@pytest.mark.long
def test_a_signal_in_the_warm_start_stops_all(tmp_path):
    run = tmp_path / "run"
    both = start_both(runs.command(run, *BOTH, "sft.updates=4000", "sft.batch_size=8"))
    end = time.monotonic() + PATIENCE
    while not (run / "sft_metrics.jsonl").exists() or not (run / "sft_metrics.jsonl").stat().st_size:
        assert time.monotonic() < end and all(process.poll() is None for process in both)
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    for code, err in finish(*both):
        assert code == 128 + signal.SIGTERM, err
    assert (run / "checkpoints" / "0").exists()


@pytest.mark.parametrize("sick", [0, pytest.param(1, marks=pytest.mark.long)])
def test_an_error_elsewhere_on_one_host_ends_the_other(tmp_path, sick):
    run, port = tmp_path / "run", free_port()
    fault = """
import empg_jax.trainer as trainer
describe = trainer.describe_update
def describe_once(*args, version, **options):
    if version == 1:
        raise OSError("no space left on device")
    return describe(*args, version=version, **options)
trainer.describe_update = describe_once
"""
    command = runs.command(run, *BOTH)
    code = START.replace("main()\n", f"{fault}\nmain()\n")
    healthy = start([*command, *seat(port, 1 - sick)])
    failing = runs.start([1, *command, *seat(port, sick)], code=code)
    (code, err), (code_of_failing, own) = finish(healthy, failing)
    assert code == 1 and f"host {sick}" in err and "no space left on device" in err, err
    assert f"--resume {run}" in err
    assert code_of_failing == 1 and "no space left on device" in own, own
    succeed(*start_both(["train", "--resume", run]))
    check_consumed(run, 3)


def test_a_guard_decides_the_same_on_all(tmp_path):
    run = tmp_path / "run"
    options = ["train.max_kl=1e-12", "train.on_kl=rollback", "train.updates=8"]
    for code, err in finish(*start_both(runs.command(run, *BOTH, *options))):
        assert code == 1 and "3 rollbacks in a row did not help" in err, err


def left_by_slurm(port, index):
    """The variables of one of two processes; JAX makes the port of host 0 from ``port``."""
    return {
        "SLURM_JOB_ID": port,
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": 2,
        "SLURM_PROCID": index,
        "SLURM_LOCALID": index,
    }


def left_by_open_mpi(port, index):
    return {
        "OMPI_MCA_orte_hnp_uri": f"{port << 12}.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": 2,
        "OMPI_COMM_WORLD_RANK": index,
        "OMPI_COMM_WORLD_LOCAL_RANK": index,
    }


@pytest.mark.parametrize("left_by", [left_by_slurm, pytest.param(left_by_open_mpi, marks=pytest.mark.long)])
def test_a_scheduler_s_variables_suffice(tmp_path, monkeypatch, left_by):
    port, processes = free_port(), []
    for index in (0, 1):
        for name, value in left_by(port, index).items():
            monkeypatch.setenv(name, str(value))
        processes.append(start(runs.command(tmp_path / "run", *BOTH, "train.updates=1", "hosts.timeout=30")))
    succeed(*processes)
    check_consumed(tmp_path / "run", 1)
