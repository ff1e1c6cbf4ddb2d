"""`empg-jax new-env` and `new-algorithm`: what they write trains and passes its tests, in an empty folder."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from empg_jax.cli import app
from empg_jax.config import load_config
from empg_jax.metrics import read_metrics
from tests import runs

# Of a tiny run everything but what the written configuration is about.
SMALL = [*runs.TINY, "train.updates=2", "sft.updates=0", "eval.tasks=2", "rollout.prefill_buckets=[16]"]


def call(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(params=["env", "algorithm"])
def written(request, tmp_path, monkeypatch):
    """Kind and name of what was written into an empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"my_{request.param}"
    code, out, err = call(f"new-{request.param}", name)
    assert (code, out) == (0, f"{tmp_path / name}\n") and f"empg-jax train {name}/config.yaml" in err
    yield request.param, name
    for module in [each for each in sys.modules if each.partition(".")[0] == name]:
        del sys.modules[module]


def test_what_is_written(written, tmp_path):
    _, name = written
    readme = (tmp_path / name / "README.md").read_text()
    assert 12 <= len(readme.splitlines()) <= 15 and f"pytest {name}" in readme
    assert not [path for path in (tmp_path / name).iterdir() if "$" in path.read_text()]
    assert load_config(f"{name}/config.yaml").name == "config"  # checked, with the entry point found


@pytest.mark.slow
def test_it_trains_and_its_tests_pass(written, tmp_path):
    """By the console script, which (other than ``python -m``) has the current folder on no path."""
    kind, name = written
    script = [sys.executable, "-P", "-c", "from empg_jax.cli import main; main()"]
    small = [*SMALL, *(["rollout.prefill_buckets=[32]"] if kind == "algorithm" else [])]
    train = [*script, "train", f"{name}/config.yaml", *small, "run_dir=run"]
    done = subprocess.run(train, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'run'}\n"
    tests = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", name]
    checked = subprocess.run(tests, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert checked.returncode == 0, checked.stdout
    assert [line["update"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")][-1] == 2
    said = "GRPO" if kind == "env" else f"{name}.recipe:RECIPE"
    assert done.stderr.startswith(said)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my-env", "'my-env' is no Python identifier: use letters, digits and _, not a digit first, for "),
        ("9lives", "for example my_9lives"),
        ("class", "for example my_class"),
        ("a/b", "for example a_b"),
        ("..", "is no Python identifier"),
        ("json", "json is the name of a Python module that is installed"),
    ],
)
@pytest.mark.parametrize("kind", ["env", "algorithm"])
def test_names_that_no_package_can_have(kind, name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(f"new-{kind}", name)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.py").write_text("precious")
    code, out, err = call("new-env", "mine")
    assert (code, out) == (2, "") and err.startswith("error: mine exists already")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["work.py"]
