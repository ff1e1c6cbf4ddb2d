"""XLA's flags by platform: set before JAX starts, known to the libraries, and never over the user's."""

import os
import subprocess
import sys
from pathlib import Path

import jaxlib
import pytest

from empg_jax.run import flags
from empg_jax.run.flags import GPU, TPU, choose_flags, set_flags

NAMES = list(GPU.flags)


@pytest.fixture
def library(tmp_path):
    """A library that knows all flags of GPUs but the last."""
    path = tmp_path / "library.so"
    path.write_bytes(b"\0".join(name.encode() for name in NAMES[:-1]))
    return path


@pytest.fixture
def machine(monkeypatch, tmp_path, library):
    """Sets the flags on a machine with these device files; returns the variables."""
    monkeypatch.setattr(flags, "_find_libraries", lambda kind: [library])

    def start(*files, **variables):
        folder = tmp_path / "-".join([*files, *variables.values(), "dev"]).replace("/", "")
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        set_flags(variables, folder)
        return variables

    return start


def test_two_gpus_get_what_the_library_knows(machine):
    found = machine("nvidia0", "nvidia1", "nvidiactl")["XLA_FLAGS"].split()
    assert [flag[2:].partition("=")[0] for flag in found] == NAMES[:-1]
    assert found[0] == "--xla_gpu_enable_latency_hiding_scheduler=true"


def test_the_users_flags_win_and_stay(machine):
    theirs = f"--{NAMES[0]}=false --xla_dump_to=/tmp/x"
    found = machine("nvidia0", "nvidia1", XLA_FLAGS=theirs)["XLA_FLAGS"]
    assert found.endswith(theirs) and found.count(NAMES[0]) == 1 and NAMES[1] in found


@pytest.mark.parametrize(
    "files, variables",
    [((), {}), (("nvidia0", "nvidiactl"), {}), (("nvidia0", "nvidia1"), {"JAX_PLATFORMS": "cpu"})],
)
def test_a_cpu_and_a_single_gpu_get_none(machine, files, variables):
    assert machine(*files, **variables) == variables


def test_a_tpu_gets_its_own_variable(machine, library):
    library.write_bytes(b"xla_enable_async_all_gather")
    assert machine("accel0") == {"LIBTPU_INIT_ARGS": "--xla_enable_async_all_gather=true"}


def test_without_a_library_no_flag_is_known(tmp_path):
    assert choose_flags(TPU, "", []) == []


def test_the_installed_jaxlib_accepts_the_flags_of_gpus():
    """An unknown flag ends the process; the CPU's client reads the flags of all platforms."""
    library = Path(jaxlib.__file__).parent / "libjax_common.so"
    found = choose_flags(GPU, "", [library])
    assert len(found) == len(NAMES)
    done = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.jit(lambda x: x + 1)(1))"],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": " ".join(found), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0 and done.stdout.strip() == "2", done.stderr
