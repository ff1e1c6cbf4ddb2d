"""`empg-jax envs | configs | algorithms`: one line for each choice, and all of them."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from empg_envs import ENVS, make_env
from empg_jax.algorithms import ALGORITHMS
from empg_jax.cli import app
from empg_jax.config import load_config
from tests import runs


def listed(command):
    result = CliRunner().invoke(app, [command])
    assert result.exit_code == 0 and result.stderr == ""
    return dict(line.split(maxsplit=1) for line in result.stdout.splitlines())


def test_environments_with_levels_and_panels():
    found = listed("envs")
    assert found.keys() == ENVS.keys()
    assert found["household"] == (
        "A generated house with objects, and a task sentence about them; "
        "level: tiny, easy, medium, hard; tasks: train 16384, valid 256, test 512"
    )
    assert "level: tiny, standard, official; tasks: train" in found["webshop"]
    # Where cages cannot be built, the line says so in place of the tasks.
    assert found["swe"].startswith("A repository with a bug")
    assert "; tasks: train" in found["swe"] or "; not ready here: " in found["swe"]


def test_an_environment_that_is_not_ready_says_why(monkeypatch):
    def make(**options):
        """Something. And more."""
        raise FileNotFoundError("no data\nfetch it first")

    spec = ENVS["household"]
    monkeypatch.setitem(ENVS, "household", type(spec)("household", make, spec.prompts, spec.parser))
    assert listed("envs")["household"] == "Something; not ready here: no data fetch it first"


def test_adapters_say_what_they_need(monkeypatch):
    for package in ("gymnasium", "reasoning_gym", "textarena"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    found = listed("envs")
    assert found["gymnasium"].startswith("An environment of Gymnasium as text")
    assert found["textarena"].startswith("A game of TextArena, alone or against an opponent")
    for name, wheel in (("gymnasium",) * 2, ("reasoning_gym", "reasoning-gym"), ("textarena",) * 2):
        assert f"; not ready here: the package {wheel} is needed (" in found[name]
        assert found[name].endswith("in the clone: pip install -e '.[adapters]'")
    needed = "not ready here: name your program, for example env.options.command='python my_agent.py'"
    assert found["harness"].endswith(needed)


def test_a_taskset_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(ValueError, match=r"package verifiers is needed .*pip install -e '\.\[verifiers\]'"):
        make_env("verifiers", taskset="my_taskset")


def test_configurations():
    found = listed("configs")
    folder = runs.ROOT / "configs"
    names = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")}
    assert found.keys() == names
    assert found["quickstart"].startswith("Learns a small text household on two CPU cores")


def test_algorithms_with_their_recipes():
    found = listed("algorithms")
    assert found.keys() == ALGORITHMS.keys()
    assert found["reinforce_pp_baseline_aem"].startswith("REINFORCE++ baseline + AEM (lambda=1")
    assert found["dapo"].startswith("DAPO; grpo(") and "clip_high=0.28" in found["dapo"]
    for name in ("grpo_empg", "gspo"):
        load_config("quickstart", [f"algorithm.name={name}"])


@pytest.mark.parametrize("command", ["envs", "configs"])
def test_they_load_no_jax(command):
    code = (
        "import sys, empg_jax.cli as cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'jax', 'flax'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command], cwd=runs.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stderr
