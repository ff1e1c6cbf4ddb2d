"""The environment variables of a worker: an allow-list, so that no token reaches an environment's code."""

from __future__ import annotations

import fnmatch
import os
import sys
from collections.abc import Sequence

# Names and patterns. Everything else (HF_TOKEN, WANDB_API_KEY, keys of clouds) stays in the trainer, unless
# workers.pass_env names it.
ALLOWED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "TZ", "LANG", "LANGUAGE", "LC_*"),
    *("TMPDIR", "TMP", "TEMP", "XDG_*", "PYTHON*", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH"),
    *("DYLD_*", "*_NUM_THREADS", "MALLOC_*"),
    *("[hH][tT][tT][pP]_[pP][rR][oO][xX][yY]", "[hH][tT][tT][pP][sS]_[pP][rR][oO][xX][yY]"),
    *("[aA][lL][lL]_[pP][rR][oO][xX][yY]", "[nN][oO]_[pP][rR][oO][xX][yY]"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "DOCKER_HOST"),
    *("ALFWORLD_DATA", "WEBSHOP_DATA"),
)


def make_environment(pass_env: Sequence[str] = ()) -> dict[str, str]:
    """Build the worker's environment variables.

    The worker finds the modules that this process finds, and those of the working directory. String hashes
    are fixed, so that an environment that iterates over a set behaves alike in every worker. Numeric
    libraries get one thread: parallelism comes from the number of workers. Accelerators are hidden, because
    the trainer has taken them.

    Args:
      pass_env: names of further variables to hand on.
    """
    here = os.getcwd()
    paths = dict.fromkeys([path or here for path in sys.path] + [here])
    patterns = (*ALLOWED, *pass_env)
    kept = {
        name: value
        for name, value in os.environ.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    # Arenas of malloc reserve address space for every thread, which counts against the memory limit.
    usual = {**threads, "MALLOC_ARENA_MAX": "2", "CUDA_VISIBLE_DEVICES": ""}
    return {**usual, **kept, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}
