"""The project as others install it: beside another package called ``envs``, in folders with their own."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
OTHER = "raise ImportError('this is another package')\n"


def run(*command, cwd, **environment):
    """Runs a command as a stranger would: nothing of this checkout is on its path."""
    ours = ("PYTHON", "XLA_", "JAX_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**clean, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def build_sdist(pip, python, folder):
    """Builds the source distribution with the back end that pyproject.toml names."""
    done = run(*pip, "install", "hatchling>=1.26", cwd=folder)
    if done.returncode and "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("the build back end (hatchling) cannot be downloaded here")
    assert done.returncode == 0, done.stderr
    done = run(python, "-m", "hatchling", "build", "-t", "sdist", "-d", folder / "dist", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "dist").glob("empg_jax-*.tar.gz")
    return path


# The tests' own environment has it as an editable installation.
@pytest.fixture(params=["wheel", "sdist", pytest.param("editable", marks=pytest.mark.long)])
def installed(request, tmp_path):
    """The folder of commands of a fresh environment with the project in it, beside another ``envs``."""
    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    what = {"wheel": [ROOT], "editable": ["--editable", ROOT]}.get(request.param)
    what = what or [build_sdist(pip, python, tmp_path)]
    done = run(*pip, "install", "--no-deps", *what, cwd=tmp_path)
    if "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("the build back end (hatchling) cannot be downloaded here")
    assert done.returncode == 0, done.stderr
    (site,) = home.glob("lib/python*/site-packages")
    # Dependencies come from the environment of the tests: its editable installations are not followed.
    (site / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (site / "envs").mkdir()
    (site / "envs" / "__init__.py").write_text(OTHER)
    return home / "bin"


@pytest.mark.slow
def test_another_package_called_envs_is_in_nobodys_way(installed, tmp_path):
    folder = tmp_path / "project"
    (folder / "envs").mkdir(parents=True)
    (folder / "envs" / "__init__.py").write_text(OTHER)
    done = run(installed / "empg-jax", "doctor", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "household started and stopped" in " ".join(done.stdout.split())
    script = (
        "import empg_envs, empg_jax\n"
        "env = empg_envs.make_env('household', level='tiny')\n"
        "print(env.reset(seed=0, split='train', index=0)[0])\n"
        "try: import envs\n"
        "except ImportError as error: print(error)"
    )
    done = run(installed / "python", "-c", script, cwd=folder)
    assert done.returncode == 0 and "this is another package" in done.stdout, done.stderr
    configs = run(installed / "empg-jax", "config", "quickstart", cwd=folder)
    assert configs.returncode == 0, configs.stderr
    # What it writes for its user comes with it.
    made = run(installed / "empg-jax", "new-env", "my_world", cwd=folder)
    assert made.returncode == 0, made.stderr
    own = run(installed / "empg-jax", "config", "my_world/config.yaml", cwd=folder)
    assert own.returncode == 0 and "entry_point: my_world.environment:Environment" in own.stdout, own.stderr


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_constraints_have_a_version_of_all_that_the_scripts_install(python):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {}
    for line in (ROOT / "scripts" / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
                (pin,) = requirement.specifier
                assert pin.operator == "==" and canonicalize_name(requirement.name) not in locked
                locked[canonicalize_name(requirement.name)] = pin.version
    needed = [Requirement(line) for line in project["dependencies"]]
    needed += [Requirement(line) for line in project["optional-dependencies"]["test"]]
    for each in needed:
        assert each.specifier.contains(locked[canonicalize_name(each.name)]), each


def test_the_extras_of_accelerators_take_the_same_jax():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (base,) = [each for each in map(Requirement, project["dependencies"]) if each.name == "jax"]
    for name in ("cuda12", "cuda13", "tpu"):
        (line,) = project["optional-dependencies"][name]
        extra = Requirement(line)
        assert (extra.name, extra.extras, extra.specifier) == ("jax", {name}, base.specifier)
