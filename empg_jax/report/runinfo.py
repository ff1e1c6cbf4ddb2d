"""The run's folder, and the files in it that say how the run was made."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from empg_jax.config import Config, ConfigError

PACKAGES = (
    "empg-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "pydantic",
)


def create_run_dir(config: Config) -> Path:
    """Make the folder of a new run: ``config.run_dir``, or ``runs/<name>-<time>``.

    Raises:
      ConfigError: the folder already holds a run, or cannot be made.
    """
    if config.run_dir is not None:
        run_dir = Path(config.run_dir).expanduser()
        if (run_dir / "config.yaml").exists():
            raise ConfigError(
                f"run_dir={config.run_dir} already holds a run: go on with --resume {config.run_dir}, "
                "or choose another run_dir"
            )
        return _make(run_dir, exist_ok=True)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        run_dir = Path("runs") / f"{config.name}-{stamp}{suffix}"
        if not run_dir.exists():
            return _make(run_dir, exist_ok=False)
    raise ConfigError(f"runs/{config.name}-{stamp} and its numbered siblings exist: set run_dir")


def is_finished(run_dir: Path, config: Config) -> bool:
    """Whether a run that is to be resumed has nothing left to do.

    Raises:
      ConfigError: it has made more updates than it is asked for; they cannot be unmade.
    """
    folder = Path(config.checkpoint.dir or run_dir / "checkpoints")
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    made, wanted = max(steps, default=0), config.train.updates
    if wanted < made:
        raise ConfigError(
            f"train.updates={wanted}: the run {run_dir} has made {made} updates already; give "
            f"train.updates={made} or more"
        )
    summary = run_dir / "summary.json"  # written when all is done
    return summary.exists() and json.loads(summary.read_text(encoding="utf-8")).get("updates") == wanted


def write_run_info(run_dir: Path, config: Config, *, resumed: bool = False) -> None:
    """Write ``config.yaml`` (resolved) and ``environment.json``.

    A resumed run keeps the first attempt's file and writes ``environment.1.json``, and so on.
    """
    write_text_atomic(run_dir / "config.yaml", config.to_yaml())
    attempt = _next_attempt(run_dir) if resumed else 0
    write_json_atomic(_info_path(run_dir, attempt), describe_environment(config.seed))


def add_run_info(run_dir: Path, values: Mapping[str, Any]) -> None:
    """Add to the newest attempt's ``environment.json`` what was found out later."""
    path = _info_path(run_dir, _next_attempt(run_dir) - 1)
    write_json_atomic(path, json.loads(path.read_text(encoding="utf-8")) | dict(values))


def _info_path(run_dir: Path, attempt: int) -> Path:
    return run_dir / (f"environment.{attempt}.json" if attempt else "environment.json")


def _next_attempt(run_dir: Path) -> int:
    attempt = 0
    while _info_path(run_dir, attempt).exists():
        attempt += 1
    return attempt


def describe_environment(seed: int) -> dict[str, Any]:
    """Everything outside the configuration that may change a result."""
    import jax

    devices = jax.devices()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "seed": seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": package_versions(),
        "backend": jax.default_backend(),
        "devices": [f"{device.platform}:{device.id} {device.device_kind}" for device in devices],
        "processes": jax.process_count(),
        "flags": {name: os.environ[name] for name in ("XLA_FLAGS", "JAX_PLATFORMS") if name in os.environ},
        "git": git_state(Path(__file__).resolve().parents[2]),
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on; those not installed are absent."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and dirty flag when ``folder`` is a git checkout, else None."""
    if not (folder / ".git").exists():
        return None
    commit, status = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain")
    return None if commit is None or status is None else {"commit": commit, "dirty": bool(status)}


def write_json_atomic(path: Path, value: Mapping[str, Any]) -> None:
    """Write indented JSON; readers see the old file or the new one, never a part."""
    write_text_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text file beside its place, then move it there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _make(run_dir: Path, *, exist_ok: bool) -> Path:
    try:
        run_dir.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        raise ConfigError(f"cannot make the run folder {run_dir}: {error.strerror}") from None
    return run_dir


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
