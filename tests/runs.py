"""Tiny whole runs: a configuration that trains within seconds, and what a test wants to know of a run.

Compilation is nearly all of their cost, so they keep to one set of shapes: see `tests.compiling`.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax

from empg_jax import trainer
from empg_jax.config import load_config
from empg_jax.metrics import read_metrics
from empg_jax.parallel.mesh import make_mesh
from empg_jax.run import assembly
from empg_jax.run.checkpoint import Checkpoints
from empg_jax.run.folder import checkpoint_dir
from empg_jax.run.restoring import load_state

ROOT = Path(__file__).parents[1]
TINY = [
    "compile_cache=null",
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.intermediate_size=64",
    "rollout.tasks_per_update=2",
    "rollout.group_size=2",
    "rollout.max_tokens=96",
    "rollout.max_response_tokens=4",
    "rollout.prefill_buckets=[32]",
    "env.max_turns=4",
    "workers.num=1",
    "workers.step_timeout=20",
    "train.updates=3",
    "train.num_minibatches=2",
    "train.micro_tokens=384",
    "train.schedule=constant",
    "train.final_learning_rate=null",
    "train.warmup_updates=0",
    "sft.updates=2",
    "sft.batch_size=4",
    "sft.demonstrations=8",
    "eval.tasks=8",
    "eval.every=0",
    "log.progress=false",
    "log.tensorboard=false",
    "checkpoint.every=1",
    "checkpoint.grace=600",  # a stop in the tests' own process must never end that process
]
HOUSE = ["env.name=null", "env.entry_point=tests.houses:HOUSE"]
# What may differ between two runs that did the same.
TIMES = ("time", "tokens_per_second", "learner_idle", "rollout_idle", "publish_pause", "cpu_seconds")


def configure(run_dir, *overrides):
    """The quickstart's configuration, made tiny."""
    return load_config("quickstart", [*TINY, f"run_dir={run_dir}", *overrides])


def train(run_dir, *overrides):
    """A new run; returns its folder."""
    return trainer.train(configure(run_dir, *overrides))


def resume(run_dir, *overrides):
    """Goes on with a run as the command line does."""
    config = load_config(run_dir / "config.yaml", overrides)
    return trainer.train(config, resume=run_dir)


def command(run_dir, *overrides):
    """Arguments of ``empg-jax`` for the same run in a process of its own."""
    return ["train", "quickstart", *TINY, f"run_dir={run_dir}", *overrides]


def start(arguments, *, code="from empg_jax.cli import main; main()"):
    """Starts the command line in a process of its own, or ``code`` with these arguments."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines(run_dir):
    """The run's metrics without what a clock says."""
    return [
        {k: v for k, v in line.items() if k not in TIMES and not k.startswith("seconds_")}
        for line in read_metrics(Path(run_dir) / "metrics.jsonl")
    ]


def restored(run_dir, step=None):
    """The run's newest checkpoint, or that of ``step``."""
    config = load_config(Path(run_dir) / "config.yaml")
    model = assembly.make_model(config, assembly.make_language(config).tokenizer)
    checkpoints = Checkpoints(checkpoint_dir(config, Path(run_dir)), keep=9, warn=print)
    mesh = make_mesh(**vars(config.mesh))
    try:
        return load_state(config, checkpoints, model, mesh, step)
    finally:
        checkpoints.close()


def weights(run_dir, step=None):
    """Every array of a checkpoint's train state as bytes, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(restored(run_dir, step).state))
    return {jax.tree_util.keystr(path): leaf.tobytes() for path, leaf in leaves}


def session_folder(tmp_path_factory):
    """The folder that all processes of a test session share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(tmp_path_factory, name, make):
    """The folder that ``make`` fills, called by the first process of a test session that asks for it."""
    folder = session_folder(tmp_path_factory) / name
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)  # another process failed at it
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder
