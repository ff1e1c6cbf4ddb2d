"""The example environment through the command that it names, as a person runs it: from its own folder."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from empg_jax.metrics import read_metrics
from empg_jax.text import load_tokenizer
from tests import runs

pytestmark = pytest.mark.slow

EXAMPLE = runs.ROOT / "scripts" / "examples" / "own_env.py"
# Of a tiny run everything but what the command itself says.
SMALL = [*runs.TINY, "train.updates=2", "rollout.prefill_buckets=[16]"]


def call(folder, *arguments):
    """The console script, which (other than ``python -m``) has the current folder on no path."""
    code = "from empg_jax.cli import main; main()"
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder in which the example was trained, and what the command said."""
    folder = tmp_path_factory.mktemp("mine")
    shutil.copy(EXAMPLE, folder)
    (line,) = re.findall(r"^empg-jax (train .*)$", EXAMPLE.read_text(), re.M)
    return folder, call(folder, *shlex.split(line), *SMALL, f"run_dir={folder / 'run'}")


def test_it_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 42


def test_it_trains_by_the_command_that_it_names(trained):
    folder, done = trained
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder / 'run'}\n"
    updates = read_metrics(folder / "run" / "metrics.jsonl")
    assert [line["update"] for line in updates][-2:] == [1, 2]
    algorithm, first, second, *_ = done.stderr.splitlines()
    assert algorithm.startswith("GRPO")
    assert "env.options of the configuration are left out" in first and "a token is a byte" in second
    assert load_tokenizer(folder / "run" / "tokenizer").encode("zwölf") == list("zwölf".encode())


def test_evaluation_says_that_it_has_fewer_tasks(trained):
    folder, _ = trained
    done = call(folder, "eval", "run", "--tasks", 100_000)
    assert done.returncode == 0, done.stderr
    assert "eval.tasks=100000: test has 256 tasks; all of them are attempted" in done.stderr
    assert json.loads(done.stdout)["eval_tasks"] == 256


def test_evaluation_of_a_split_that_does_not_exist(trained):
    folder, _ = trained
    done = call(folder, "eval", "run", "--split", "tset")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(
        "error: env.eval_split=tset does not exist; the environment has train, test\n"
    )


def test_an_export_says_how_to_read_the_byte_tokenizer(trained, tmp_path):
    folder, _ = trained
    done = call(folder, "export", "run", "--out", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert "the tokenizer has a token per byte: read it with transformers.PreTrained" in done.stderr
    assert load_tokenizer(tmp_path / "model").encode("e\u0301") == list("e\u0301".encode())


def test_from_another_folder_the_module_is_missed_in_one_line(trained, tmp_path):
    folder, _ = trained
    for command in (["eval", folder / "run"], ["train", "--resume", folder / "run", "train.updates=3"]):
        done = call(tmp_path, *command)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert "cannot import 'own_env'" in done.stderr and "Traceback" not in done.stderr
