"""``empg-jax doctor``: what is installed here, what works, and what to do about the rest."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from empg_jax.report.environment import package_versions
from empg_jax.run.flags import tell_flags

# Modules of the extras, and what each is for.
EXTRAS = {
    "serve": (("starlette", "uvicorn"), "empg-jax serve, env.name=harness"),
    "sampler": (("httpx",), "rollout.engine=openai"),
    "deepsearch": (("bm25s",), "a faster BM25 for empg-jax retrieve"),
    "tantivy": (("tantivy",), "BM25 over large corpora"),
    "faiss": (("faiss",), "FAISS's index files for empg-jax retrieve"),
    "parquet": (("pyarrow",), "tasks, questions and passages in parquet files"),
    "wandb": (("wandb",), "log.wandb=true"),
    "mlflow": (("mlflow",), "log.mlflow=true"),
    "trackio": (("trackio",), "log.trackio=true"),
    "ray": (("ray",), "workers.backend=ray"),
    "adapters": (("gymnasium", "reasoning_gym", "textarena", "websockets"), "environments of others"),
    "verifiers": (("verifiers",), "env.name=verifiers"),
    "swerex": (("swerex",), "swe in containers"),
    "alfworld": (("alfworld",), "the original engine, to compare with"),
}
ACCELERATORS = {
    "cuda": (
        ("/dev/nvidia0", "/dev/nvidiactl"),
        "an NVIDIA GPU",
        "install the extra cuda12 (or cuda13), in the clone: pip install -e '.[cuda12]'",
    ),
    "tpu": (
        ("/dev/accel0", "/dev/vfio/0"),
        "a TPU",
        "install the extra tpu, in the clone: pip install -e '.[tpu]'",
    ),
}
LEAST_MEMORY = 2 * 2**30  # bytes that the quickstart should find free


class Problem(Exception):
    """A check that did not pass, with a remedy.

    Args:
      said: what is wrong.
      todo: what to do about it.
      is_fatal: whether nothing can be trained like this.
    """

    def __init__(self, said: str, todo: str, *, is_fatal: bool = True) -> None:
        super().__init__(said)
        self.todo, self.is_fatal = todo, is_fatal


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
      name: what was looked at.
      status: ``ok``, ``note`` (works without it) or ``failed``.
      said: what was found.
      todo: what to do about it; empty where nothing is to be done.
    """

    name: str
    status: str
    said: str
    todo: str = ""


def examine() -> Iterator[Finding]:
    """Run every check, whatever the others found; yield a finding after each."""
    for name, check in CHECKS.items():
        try:
            yield Finding(name, "ok", check())
        except Problem as problem:
            status = "failed" if problem.is_fatal else "note"
            yield Finding(name, status, str(problem), problem.todo)
        except Exception as error:  # the other checks are informative whatever failed here
            said = f"{type(error).__name__}: {str(error).strip() or 'without a message'}"
            yield Finding(name, "failed", said, REMEDIES.get(name, "see the message"))


def as_report(findings: list[Finding]) -> dict[str, Any]:
    """Convert findings to one JSON object."""
    is_ok = all(finding.status != "failed" for finding in findings)
    return {"ok": is_ok, "findings": [dataclasses.asdict(finding) for finding in findings]}


def _packages() -> str:
    versions = {"python": platform.python_version()} | package_versions()
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    from packaging.requirements import Requirement

    wrong = []
    for line in importlib.metadata.requires("empg-jax") or ():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{needed.name} is missing")
            continue
        if not needed.specifier.contains(found, prereleases=True):
            wrong.append(f"{needed.name} {found} is not {needed.specifier}")
    if wrong:
        raise Problem(
            f"{'; '.join(wrong)} ({told})", "install the project again; pip then brings what it needs"
        )
    return told


def _devices() -> str:
    import jax

    devices, backend = jax.devices(), jax.default_backend()
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    told = f"{backend}, {len(devices)} x {devices[0].device_kind}"
    told += f", {memory / 2**30:.1f} GiB each" if memory else ""
    for paths, what, remedy in ACCELERATORS.values():
        if backend == "cpu" and any(Path(path).exists() for path in paths):
            asked = os.environ.get("JAX_PLATFORMS")
            why = f"JAX_PLATFORMS={asked}" if asked else "JAX was installed without it"
            todo = "unset JAX_PLATFORMS" if asked else remedy
            raise Problem(f"{told}; {what} is here, but not used ({why})", todo, is_fatal=False)
    return told


def _memory() -> str:
    pages = {name: os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_PHYS_PAGES", "SC_AVPHYS_PAGES")}
    total = pages["SC_PAGE_SIZE"] * pages["SC_PHYS_PAGES"]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux
        free = pages["SC_PAGE_SIZE"] * pages["SC_AVPHYS_PAGES"]
    told = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, {os.cpu_count()} CPUs"
    if free < LEAST_MEMORY:
        raise Problem(told, "close other programs: the quickstart takes up to 2 GiB", is_fatal=False)
    return told


def _attention() -> str:
    import jax

    kernels = {"cpu": "tiles (XLA)", "cuda": "triton", "rocm": "tiles (XLA)", "tpu": "splash"}
    backend = jax.devices()[0].client.platform_version.lower()
    platform_name = jax.default_backend()
    if platform_name == "gpu":
        platform_name = "rocm" if "rocm" in backend else "cuda"
    used = kernels.get(platform_name, "tiles (XLA)")
    decode = "ragged (Pallas)" if platform_name == "cuda" else "dense products"
    others = ", ".join(f"{name}: {kernel}" for name, kernel in kernels.items() if name != platform_name)
    return (
        f"learner: {used}, sampler: {decode} ({others}; rows below 128 tokens, and heads other than 64, 128 "
        "and 256, take tiles everywhere; model.attention=xla turns the kernels off)"
    )


def _compile_cache() -> str:
    from empg_jax.run.process import cache_folder

    folder = cache_folder("auto")
    home = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(home, os.W_OK):
        raise Problem(
            f"{folder} cannot be written, so every start compiles anew",
            "compile_cache=FOLDER names another; JAX_COMPILATION_CACHE_DIR=FOLDER does so for all of JAX",
            is_fatal=False,
        )
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
    size = sum(path.stat().st_size for path in files)
    return f"{folder}, {len(files)} files, {size / 2**20:.0f} MiB, writable; it may be deleted at any time"


def _extras() -> str:
    import importlib.util

    is_there = {
        name: all(importlib.util.find_spec(module) is not None for module in modules)
        for name, (modules, _) in EXTRAS.items()
    }
    missing = [name for name, there in is_there.items() if not there]
    told = f"present: {', '.join(name for name, there in is_there.items() if there) or 'none'}"
    if missing:
        purposes = ", ".join(f"{name} ({EXTRAS[name][1]})" for name in missing)
        todo = f"leave out what you do not need, in the clone: pip install -e '.[{','.join(missing)}]'"
        raise Problem(f"{told}; missing: {purposes}", todo, is_fatal=False)
    return told


def _bubblewrap() -> str:
    from empg_envs.swe.bubblewrap import probe
    from empg_envs.swe.sandbox import SandboxError

    try:
        probe()
    except SandboxError as error:
        raise Problem(str(error), "only env.name=swe needs it", is_fatal=False) from None
    return "a sandbox starts (env.name=swe)"


def _arithmetic() -> str:
    """Compare compiled matrix products with their known value: rows of 1/n times columns of ones give 1."""
    import jax
    import jax.numpy as jnp

    size, told = 256, []
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 1e-2)):
        product = jax.jit(jnp.matmul)(
            jnp.full((size, size), 1.0 / size, dtype), jnp.ones((size, size), dtype)
        )
        error = float(jnp.abs(product.astype(jnp.float32) - 1.0).max())
        if not error <= tolerance:
            raise ArithmeticError(f"a {dtype} matrix product is off by {error:g}, more than {tolerance:g}")
        told.append(f"{dtype} products within {error:.0e}")
    return ", ".join(told)


def _worker(timeout: float = 30.0) -> str:
    """Start one environment worker and let it stop at the end of its input."""
    start: dict[str, object] = {"env": "household", "options": {}, "memory_limit_mb": None}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "empg_envs.worker"],
        input=json.dumps(start) + "\n",
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    answer = json.loads(done.stdout.partition("\n")[0] or "{}")
    if not answer.get("ready"):
        raise RuntimeError(answer.get("fatal") or done.stderr.strip() or "the worker said nothing")
    splits = ", ".join(f"{name} {count}" for name, count in answer.get("splits", {}).items())
    return f"household started and stopped in {time.monotonic() - began:.2f} s ({splits} tasks)"


def _learn() -> str:
    """Write a tiny state as a checkpoint, restore it, and make an optimizer step of it."""
    from empg_jax.run.doctor_step import check_checkpoint, check_step

    with tempfile.TemporaryDirectory(prefix="empg-doctor-") as folder:
        return f"{check_checkpoint(Path(folder))}; {check_step()}"


CHECKS: dict[str, Callable[[], str]] = {
    "packages": _packages,
    "devices": _devices,
    "XLA flags": tell_flags,
    "memory": _memory,
    "attention": _attention,
    "compile cache": _compile_cache,
    "extras": _extras,
    "bubblewrap": _bubblewrap,
    "arithmetic": _arithmetic,
    "worker": _worker,
    "training": _learn,
}
REMEDIES = {
    "devices": "JAX does not start: JAX_PLATFORMS=cpu takes the CPU; else install jax for this machine anew",
    "arithmetic": "do not train on this machine: its driver, or jaxlib, computes wrong numbers",
    "worker": "python -m empg_envs.worker must start: install the project again",
    "training": "the message says what fails; TMPDIR=FOLDER names another place for the test checkpoint",
}
