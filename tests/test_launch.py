"""The launch files: what each would start, and runs of two processes behind stand-ins for srun and ssh."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from empg_jax.config.load import RESUMABLE_KEYS
from empg_jax.metrics import read_metrics
from empg_jax.run.consumed import read_consumed
from tests import runs
from tests.test_hosts import free_port

LAUNCH = runs.ROOT / "scripts" / "launch"
HOST = str(LAUNCH / "host.sh")
PATIENCE = 300.0
RUN = ["/runs/x", "quickstart", "env.options={level: tiny}", "seed=1"]


def show(launcher, *arguments, **variables):
    """The commands that a launcher prints, each split as a shell does."""
    program = [sys.executable] if launcher.endswith(".py") else ["bash"]
    done = subprocess.run(
        [*program, LAUNCH / launcher, "--print", *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def split(text):
    return [shlex.split(line) for line in text.splitlines()]


# ------------------------------------------------------------------------------------------- --print


def test_ssh_starts_every_host_with_its_seat():
    told = split(show("ssh.sh", "me@node0,node1,node2", *RUN, EMPG_PORT="99"))
    assert [command[:4] for command in told] == [
        ["ssh", "-o", "BatchMode=yes", host] for host in ("me@node0", "node1", "node2")
    ]
    for index, command in enumerate(told):
        seat = ["hosts.coordinator=node0:99", "hosts.num=3", f"hosts.index={index}"]
        assert shlex.split(command[4]) == ["env", "EMPG_HOLD=1", HOST, *RUN, *seat]


def test_slurm_starts_one_process_on_each_node():
    (told,) = split(show("slurm.sbatch", *RUN))
    assert told == ["srun", "--kill-on-bad-exit=1", "scripts/launch/host.sh", *RUN]
    options = [line for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if "#SBATCH" in line]
    assert "#SBATCH --ntasks-per-node=1" in options and "#SBATCH --requeue" in options


def test_a_tpu_pod_gets_one_command_for_all_workers():
    (told,) = split(show("tpu_pod.sh", "pod", "us-east5-a", *RUN, EMPG_DIR="/code", EMPG_COMMAND="a b"))
    assert " ".join(told[:-1]) == "gcloud compute tpus tpu-vm ssh pod --zone=us-east5-a --worker=all"
    option, _, remote = told[-1].partition("=")
    command = ["env", "EMPG_COMMAND=a b", "/code/scripts/launch/host.sh", *RUN, "hosts.enabled=true"]
    assert option == "--command" and shlex.split(remote) == command


def test_a_ray_job_has_its_workers_on_ray():
    (told,) = split(
        show("ray_job.sh", "http://head:8265", *RUN, EMPG_RAY_OPTIONS="--entrypoint-num-gpus=8 --no-wait")
    )
    options = ["--address=http://head:8265", "--entrypoint-num-gpus=8", "--no-wait"]
    assert told[:-1] == ["ray", "job", "submit", *options, "--", "bash", "-c"]
    assert shlex.split(told[-1]) == ["env", HOST, *RUN, "workers.backend=ray"]


def test_a_jobset_gives_every_pod_its_seat():
    jobset = yaml.safe_load(show("jobset.py", "mine", "registry/image:1", "4", *RUN))
    assert jobset["kind"] == "JobSet" and jobset["metadata"]["name"] == "mine"
    (job,) = jobset["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    assert pods["parallelism"] == pods["completions"] == 4 and pods["completionMode"] == "Indexed"
    (container,) = pods["template"]["spec"]["containers"]
    assert container["image"] == "registry/image:1"
    # The names that JobSet gives: of the first pod of the only job, below a service of the set's name.
    assert container["args"] == [
        *RUN,
        f"hosts.coordinator=mine-{job['name']}-0-0.mine:8476",
        "hosts.num=4",
        "hosts.index=$(JOB_COMPLETION_INDEX)",
    ]
    # The file itself can be applied, too, once it has an image.
    example = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert example["spec"]["replicatedJobs"][0]["name"] == job["name"]


@pytest.mark.parametrize("launcher", ["ssh.sh", "slurm.sbatch", "tpu_pod.sh", "ray_job.sh"])
def test_a_launcher_without_arguments_tells_its_usage(launcher):
    done = subprocess.run(["bash", LAUNCH / launcher], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"{launcher} " in done.stderr and "RUN_DIR CONFIG" in done.stderr


# -------------------------------------------------------------------------------------------- executed


def go_on(run, *overrides):
    """The command that starts a run again, and what is said beside it."""
    run.mkdir(exist_ok=True)
    (run / "config.yaml").touch()
    done = subprocess.run(
        ["bash", HOST, run, "quickstart", *overrides],
        env=os.environ | {"EMPG_COMMAND": "echo"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip(), done.stderr.strip()


def test_a_run_that_goes_on_takes_what_may_change_and_names_the_rest(tmp_path):
    may = [key.replace("*", "x") + "=1" for key in RESUMABLE_KEYS] + ["log={wandb: true}"]
    command, told = go_on(tmp_path / "run", *may)
    assert command == " ".join(["train", "--resume", str(tmp_path / "run"), *may]) and told == ""
    command, told = go_on(tmp_path / "run", "seed=1", "train.updates=8", "train.updates_more=1")
    assert command == f"train --resume {tmp_path / 'run'} train.updates=8"
    assert told == f"{tmp_path / 'run'} goes on as it began; without effect: seed=1 train.updates_more=1"


SRUN = """#!/usr/bin/env bash
# Two nodes of one task each, with the variables that srun sets.
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NODELIST=localhost,localhost SLURM_LOCALID=0
SLURM_PROCID=0 "$@" & first=$!
SLURM_PROCID=1 "$@" & second=$!
wait $first && wait $second
"""
SSH = """#!/usr/bin/env bash
# The other host is this one.
[[ $1 == -o ]] && shift 2
host=$1
shift
echo "stand-in for $host"
sh -c "$*" 2>&1 | cat  # as ssh, until nobody holds the output any more
exit "${PIPESTATUS[0]}"
"""
BOTH = [*runs.HOUSE, "mesh.data=2", "sft.updates=0", "eval.tasks=4", "rollout.deterministic=true"]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts srun and ssh of our own first on the path, and one fake device into each process."""
    for name, script in (("srun", SRUN), ("ssh", SSH)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    monkeypatch.setenv("EMPG_COMMAND", f"{sys.executable} -m empg_jax")


def start(launcher, *arguments):
    return subprocess.Popen(
        ["bash", LAUNCH / launcher, *arguments],
        cwd=runs.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    out, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, out


def line_of(run, *overrides):
    """RUN_DIR CONFIG and overrides of a tiny run."""
    _, config, *settings = runs.command(run, *BOTH, "hosts.timeout=60", *overrides)
    return [str(run), config, *(each for each in settings if not each.startswith("run_dir="))]


def check_consumed(run, updates):
    records = list(read_consumed(run))
    assert [record["group_id"] for record in records] == list(range(2 * updates))


@pytest.mark.long
@pytest.mark.slow
def test_slurm_trains_with_two_processes(tmp_path, stand_in, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setenv("SLURM_JOB_ID", str(free_port()))  # JAX makes the port from it
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(runs.ROOT))
    code, out = finish(start("slurm.sbatch", *line_of(run, "train.updates=2")))
    assert code == 0, out
    check_consumed(run, 2)


@pytest.mark.slow
def test_ssh_trains_stops_and_goes_on_with_two_processes(tmp_path, stand_in, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setenv("EMPG_PORT", str(free_port()))
    command = ["127.0.0.1,localhost", *line_of(run, "train.updates=6", "env.options.latency=0.2")]
    process = start("ssh.sh", *command)
    end = time.monotonic() + PATIENCE
    while not (run / "metrics.jsonl").exists() or not list(read_metrics(run / "metrics.jsonl")):
        assert time.monotonic() < end and process.poll() is None, finish(process)
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, out = finish(process)
    assert code == 128 + signal.SIGTERM and f"go on with: empg-jax train --resume {run}" in out, out
    assert "127.0.0.1: stand-in for 127.0.0.1" in out and "localhost: stand-in for localhost" in out
    # The same command goes on.
    code, out = finish(start("ssh.sh", *command))
    assert code == 0, out
    check_consumed(run, 6)


@pytest.mark.slow
def test_a_host_that_refuses_ends_the_launcher(tmp_path, stand_in):
    code, out = finish(start("ssh.sh", "a,b", *line_of(tmp_path / "run", "train.updates=-1")))
    assert code == 2 and "train.updates=-1" in out, out
