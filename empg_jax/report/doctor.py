"""A check of the installation: versions, devices, arithmetic, environment workers."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

from empg_jax.report.environment import package_versions


def check_installation(console: Console) -> bool:
    """Run every check and print one line for each; return True when all passed."""
    checks: dict[str, Callable[[], str]] = {
        "packages": _packages,
        "devices": _devices,
        "float32": lambda: _arithmetic("float32", tolerance=1e-5),
        "bfloat16": lambda: _arithmetic("bfloat16", tolerance=1e-2),
        "worker": _worker,
    }
    passed = True
    for name, check in checks.items():
        try:
            console.print(f"[green]ok    [/green] {name}: {escape(check())}", soft_wrap=True)
        except Exception as error:  # the other checks are informative whatever failed here
            passed = False
            told = escape(f"{type(error).__name__}: {error}")
            console.print(f"[red]failed[/red] {name}: {told}", soft_wrap=True)
    return passed


def _packages() -> str:
    versions = {"python": platform.python_version()} | package_versions()
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _devices() -> str:
    import jax

    devices = jax.devices()
    return f"{jax.default_backend()}, {len(devices)} x {devices[0].device_kind}"


def _arithmetic(dtype: str, tolerance: float) -> str:
    """Compare a compiled matrix product with its known value: rows of 1/n times columns of ones give 1."""
    import jax
    import jax.numpy as jnp

    size = 256
    product = jax.jit(jnp.matmul)(jnp.full((size, size), 1.0 / size, dtype), jnp.ones((size, size), dtype))
    error = float(jnp.abs(product.astype(jnp.float32) - 1.0).max())
    if not error <= tolerance:
        raise ArithmeticError(f"matrix product is off by {error:g}, more than {tolerance:g}")
    return f"matrix product within {error:.0e}"


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
