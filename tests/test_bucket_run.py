"""A run whose checkpoints lie in a bucket does what a run with a local folder does, killed or not."""

import json
import sys

import pytest
from fsspec.registry import _registry
from typer.testing import CliRunner

from empg_jax.cli import app
from empg_jax.run.consumed import read_consumed
from empg_jax.run.folder import checkpoint_dir
from empg_jax.run.step_folders import open_step_folders
from tests import buckets, runs

SHORT = [*runs.HOUSE, "sft.updates=0", "eval.tasks=2", "rollout.deterministic=true", "checkpoint.keep=2"]
URL = f"gs://{buckets.NAME}/runs/one"
# Ends the process when all of checkpoint 2 is written but for the object that marks it complete.
KILLED = """
import os, signal
from etils import epath
write = epath.Path.write_text
def write_text(path, *rest, **options):
    if str(path).endswith("/2/commit_success.txt"):
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, *rest, **options)
type(epath.Path("gs://a/b")).write_text = write_text
from empg_jax.cli import main
main()
"""


def call(*arguments):
    """Exit code, stdout and stderr of ``empg-jax``."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def steps(run):
    return open_step_folders(checkpoint_dir(runs.load_config(run / "config.yaml"), run)).steps


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_run_goes_on_from_the_bucket_as_from_a_folder(tmp_path):
    with buckets.served():
        options = [*SHORT, "train.updates=3"]
        whole = runs.train(tmp_path / "whole", *options)

        run = tmp_path / "run"
        killed = runs.start(runs.command(run, *options, f"checkpoint.dir={URL}"), code=KILLED)
        _, err = killed.communicate(timeout=600)
        assert killed.returncode == -9, err
        assert steps(run)[-1] == 1 and not (run / "checkpoints").exists()
        assert "2" in {path.name for path in open_step_folders(URL).directory.iterdir()}

        code, _, err = call("train", "--resume", run)
        assert code == 0, err
        assert steps(run) == steps(whole)
        assert runs.weights(run) == runs.weights(whole) and runs.lines(run) == runs.lines(whole)
        assert list(read_consumed(run)) == list(read_consumed(whole))

        newest = max(steps(run))
        code, _, err = call("train", "--resume", run, "--step", newest - 1)
        assert code == 0 and f"checkpoints [{newest}] are set aside" in err
        assert runs.weights(run) == runs.weights(whole)

        code, _, err = call("export", run / "checkpoints" / str(newest - 1), "--out", tmp_path / "model")
        assert code == 0 and f"model of step {newest - 1} written" in err
        code, out, err = call("eval", run / "checkpoints" / str(newest), "--tasks", "2")
        assert code == 0 and json.loads(out)["step"] == newest, err
        code, _, err = call("export", run / "checkpoints" / "99", "--out", tmp_path / "none")
        assert code == 2 and f"{URL} has no checkpoint 99; it has:" in err

        code, _, err = call("train", "quickstart", *runs.TINY, *options, f"checkpoint.dir={URL}")
        assert code == 2 and "holds checkpoints of another run" in err
        nowhere = [f"run_dir={tmp_path / 'nowhere'}", "checkpoint.dir=gs://nowhere/run"]
        code, _, err = call("train", "quickstart", *runs.TINY, *options, *nowhere)
        assert code == 2 and "checkpoint.dir=gs://nowhere/run cannot be used: " in err
        assert "the bucket must exist" in err and not (tmp_path / "nowhere").exists()


def test_the_missing_package_is_named_before_a_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(_registry, "gcs", raising=False)
    run = [f"run_dir={tmp_path / 'run'}", f"checkpoint.dir={URL}"]
    code, _, err = call("train", "quickstart", *runs.TINY, *SHORT, *run)
    assert code == 2 and f"checkpoint.dir={URL} needs the package gcsfs: pip install -e '.[gcs]'" in err
    assert not (tmp_path / "run").exists()
