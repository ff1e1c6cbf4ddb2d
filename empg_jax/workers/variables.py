"""The environment variables of a worker: an allow-list, so that no token reaches an environment's code."""

from __future__ import annotations

import fnmatch
import os
import sys
from collections.abc import Mapping, Sequence

# Names and patterns. Everything else (HF_TOKEN, WANDB_API_KEY, keys of clouds) stays in the trainer, unless
# workers.pass_env names it.
ALLOWED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "TZ", "LANG", "LANGUAGE", "LC_*"),
    *("TMPDIR", "TMP", "TEMP", "XDG_*", "PYTHON*", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH"),
    *("DYLD_*", "*_NUM_THREADS", "MALLOC_*"),
    *("[hH][tT][tT][pP]_[pP][rR][oO][xX][yY]", "[hH][tT][tT][pP][sS]_[pP][rR][oO][xX][yY]"),
    *("[aA][lL][lL]_[pP][rR][oO][xX][yY]", "[nN][oO]_[pP][rR][oO][xX][yY]"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "DOCKER_HOST"),
    *("ALFWORLD_DATA", "WEBSHOP_DATA", "NLTK_DATA"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE"),
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
    kept = _select(os.environ, (*ALLOWED, *pass_env))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    # Arenas of malloc reserve address space for every thread, which counts against the memory limit.
    usual = {**threads, "MALLOC_ARENA_MAX": "2", "CUDA_VISIBLE_DEVICES": ""}
    return {**usual, **kept, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}


def merge_environment(
    own: Mapping[str, str], brought: Mapping[str, str], pass_env: Sequence[str]
) -> dict[str, str]:
    """Merge a worker's variables on its machine with those that it would have on the trainer's.

    The machine's own win, because folders differ between machines. What ``pass_env`` names comes from the
    trainer. Modules are looked for in the trainer's folders, too, as on a shared file system.

    Args:
      own: `make_environment` on the worker's machine.
      brought: `make_environment` on the trainer's.
      pass_env: names of variables to hand on.
    """
    paths = [*brought["PYTHONPATH"].split(os.pathsep), *own["PYTHONPATH"].split(os.pathsep)]
    # Ray puts copies of other packages on the path of its own processes.
    paths = [path for path in paths if os.path.basename(os.path.dirname(path)) != "ray"]
    merged = {**brought, **own, **_select(brought, pass_env)}
    merged.pop("PYTHONBREAKPOINT", None)  # Ray's debugger waits for a connection
    return {**merged, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _select(variables: Mapping[str, str], patterns: Sequence[str]) -> dict[str, str]:
    return {
        name: value
        for name, value in variables.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
