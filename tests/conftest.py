"""Settings for the whole suite: eight fake devices, strict dtypes, no rank promotion."""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Processes that tests start import this checkout, whatever is installed.
ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "envs"), *filter(None, [os.environ.get("PYTHONPATH")])]
)
# Commands that tests start keep compiled programs in a folder of the tests, not in the user's.
if "PYTEST_XDIST_WORKER" not in os.environ:  # these have the folder of the process that started them
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="empg-jax-cache-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

from jaxtyping import install_import_hook

# Shape annotations are executed under pytest only.
CHECKED = ("empg_jax.algorithms", "empg_jax.models", "empg_jax.hf", "empg_jax.learner")
install_import_hook(CHECKED, "beartype.beartype")

import jax
import pytest

from empg_envs.worker import resident_mb
from tests.compiling import optimized_programs, share_programs

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

MOST_MB = 2500  # of a process of the tests, between two files

share_programs(Path(os.environ["XDG_CACHE_HOME"]) / "compiled")


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory():
    """Programs of earlier files are dropped where a process has grown large; the folder keeps them."""
    yield
    if resident_mb() > MOST_MB:
        gc.collect()
        jax.clear_caches()


@pytest.fixture(scope="module")
def optimized():
    """All optimizations, for the programs of a file that run for long."""
    with optimized_programs():
        yield


FIRST = ("test_learning.py",)  # takes minutes a test: at the end, one worker alone would be busy with it


def pytest_collection_modifyitems(items):
    """Begin with the longest tests."""
    items.sort(key=lambda item: item.path.name not in FIRST)
