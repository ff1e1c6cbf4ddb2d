"""Compiled programs stay on disk: the second start of a run compiles none of them again."""

import os
import subprocess
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from empg_jax.run.process import use_compile_cache
from tests import runs

pytestmark = pytest.mark.slow


def train(run_dir, home):
    # Without the barrier, which answers meet in a step depends on their arrival, and the last bits with it.
    arguments = [*runs.TINY[1:], "rollout.deterministic=true", "train.updates=1", f"run_dir={run_dir}"]
    command = [sys.executable, "-m", "empg_jax", "train", "quickstart", *arguments]
    here = {name: value for name, value in os.environ.items() if "_CACHE_" not in name}
    here["XDG_CACHE_HOME"] = str(home)
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=here)
    assert done.returncode == 0, done.stderr
    return {path.name for path in home.rglob("*-cache")}


def test_the_second_start_finds_every_program(tmp_path):
    first = train(tmp_path / "first", tmp_path / "home")
    assert len(first) > 10
    assert train(tmp_path / "second", tmp_path / "home") == first
    assert runs.lines(tmp_path / "first")[0]["loss"] == runs.lines(tmp_path / "second")[0]["loss"]


@pytest.fixture
def settings():
    names = ("dir", "min_compile_time_secs", "min_entry_size_bytes")
    names = [f"jax_{'compilation' if name == 'dir' else 'persistent'}_cache_{name}" for name in names]
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("settings")
def test_a_folder_that_jax_was_told_stays(tmp_path):
    use_compile_cache(None)
    assert not jax.config.jax_compilation_cache_dir
    use_compile_cache(str(tmp_path / "mine"))
    found = jax.config.jax_compilation_cache_dir
    assert found.startswith(f"{tmp_path / 'mine'}/")
    use_compile_cache("auto")
    assert jax.config.jax_compilation_cache_dir == found
