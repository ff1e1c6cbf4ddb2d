"""The examples of `scripts/examples` do what their first lines say, each in a process of its own."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests import runs

EXAMPLES = runs.ROOT / "scripts" / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))
# Groups of two in a house where every third text wins: soon one wins as a whole.
SMALL = [*runs.TINY, *runs.HOUSE, "rollout.prefill_buckets=[32]", "sft.updates=0", "eval.tasks=2"]
# What a notebook program offers beside Python.
NOTEBOOK_PROGRAM = """
import sys, types
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].version_info = (9, 0)  # matplotlib looks at it
sys.modules["IPython.display"] = shown = types.ModuleType("IPython.display")
shown.Image = lambda filename: filename.name if filename.stat().st_size else None
shown.display = lambda picture: print(picture, "is shown")
"""
CONSOLE = "from empg_jax.cli import main; main()"


def call(folder, *command, text_in=None, **variables):
    environment = {**runs.os.environ, **variables}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder, env=environment, input=text_in, capture_output=True, text=True, timeout=500,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_says_how_it_is_run(name):
    text = (EXAMPLES / name).read_text()
    assert len(text.splitlines()) < 60
    assert re.search(r"(?m)(^|\d\. |Say: )(empg-jax|python) ", text)


def test_a_loop_of_ones_own_learns(tmp_path):
    done = call(tmp_path, EXAMPLES / "own_loop.py")
    assert done.returncode == 0, done.stderr
    returns = [float(value) for value in re.findall(r"mean return (\d\.\d+)", done.stdout)]
    assert len(returns) == 6 and returns[0] < 0.9 < returns[-1]


@pytest.mark.slow
def test_an_own_algorithm_is_trained_and_its_rollouts_are_read(tmp_path):
    shutil.copy(EXAMPLES / "own_algorithm.py", tmp_path)
    (line,) = re.findall(r"(?m)^empg-jax (train .*)$", (EXAMPLES / "own_algorithm.py").read_text())
    done = call(tmp_path, "-P", "-c", CONSOLE, *shlex.split(line), *SMALL, "train.updates=1", "run_dir=run")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("own_algorithm:RECIPE + AEM")
    read = call(tmp_path, EXAMPLES / "read_rollouts.py", "run")
    assert read.returncode == 0, read.stderr
    assert "turns of 4 episodes\n" in read.stdout and "moved most: " in read.stdout


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    code[0] += f"\noverrides = {[*SMALL, 'log.rollouts_every=1']}"
    (tmp_path / "notebook.py").write_text("\n\n".join([NOTEBOOK_PROGRAM, *code]))
    done = call(tmp_path, "notebook.py")
    assert done.returncode == 0, done.stderr
    assert "> go to" in done.stdout and "entropy  factor" in done.stdout and "AEM" in done.stdout
    assert "curves.png is shown" in done.stdout
    assert (tmp_path / "runs" / "notebook" / "model" / "config.json").exists()


@pytest.mark.long
@pytest.mark.slow
def test_a_nan_is_found_and_the_run_goes_on(tmp_path):
    source = (EXAMPLES / "debug_nan.py").read_text()
    shutil.copy(EXAMPLES / "debug_nan.py", tmp_path)
    first, second, third = re.findall(r"(?m)^\d\. (?:FLOOR=1e-3 )?empg-jax ([^#]*?) *(?:#.*)?$", source)
    more = [*SMALL, "train.updates=8", "rollout.deterministic=true"]
    done = call(tmp_path, "-P", "-c", CONSOLE, *shlex.split(first), *more)
    assert done.returncode == 1 and "(empg-jax inspect)" in done.stderr, done.stderr
    told = call(tmp_path, "-P", "-c", CONSOLE, *shlex.split(second))
    assert told.returncode == 0 and "  credit.advantages: " in told.stdout, told.stderr
    assert "return 1, " in told.stdout and "advantages nan to nan" in told.stdout
    assert call(tmp_path, "-P", "-c", CONSOLE, *shlex.split(third), FLOOR="1e-3").returncode == 0
