"""What the shell completes behind a command: names of configurations and environments, keys of overrides."""

from __future__ import annotations

import glob
from pathlib import Path


def complete_config(incomplete: str) -> list[str]:
    """List the packaged configurations, and the YAML files and folders, that begin so."""
    from empg_jax.config.yaml import find_packaged

    found = [name for name in find_packaged() if name.startswith(incomplete)]
    for path in sorted(glob.glob(f"{glob.escape(incomplete)}*")):
        if path.endswith((".yaml", ".yml")):
            found.append(path)
        elif Path(path).is_dir():
            found.append(f"{path}/")
    return found


def complete_override(incomplete: str) -> list[str]:
    """List the keys that begin so; behind a key and ``=``, the values that it may have."""
    from empg_envs import ENVS
    from empg_jax.config import describe, list_choices

    key, equals, value = incomplete.partition("=")
    if equals:
        choices = {"env.name": list(ENVS), **list_choices()}.get(key, ())
        return [f"{key}={choice}" for choice in choices if str(choice).startswith(value)]
    return [f"{path}=" for path, _, _ in describe() if path.startswith(key)]


def complete_env(incomplete: str) -> list[str]:
    """List the environments that begin so."""
    from empg_envs import ENVS

    return [name for name in ENVS if name.startswith(incomplete)]
