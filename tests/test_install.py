"""The project as others install it: beside another package called ``envs``, in folders with their own."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OTHER = "raise ImportError('this is another package')\n"

pytestmark = pytest.mark.slow


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


@pytest.fixture(params=["wheel", "editable"])
def installed(request, tmp_path):
    """The folder of commands of a fresh environment with the project in it, beside another ``envs``."""
    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    what = [ROOT] if request.param == "wheel" else ["--editable", ROOT]
    pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "--disable-pip-version-check"]
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
