"""A check that this machine has the devices that a configuration asks for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax

from empg_jax.errors import ConfigError

if TYPE_CHECKING:
    from empg_jax.config import Config


def check_devices(config: Config) -> None:
    """Check that there are enough devices for the learner and for the engine.

    Raises:
      ConfigError: there are too few devices; the message names the keys.
    """
    mesh, rollout = dict(vars(config.mesh)), config.rollout
    sizes = {f"mesh.{axis}": size for axis, size in mesh.items()}
    _check(sizes, jax.devices())
    _check({"rollout.data": rollout.data, "rollout.tensor": rollout.tensor}, jax.local_devices())


def _check(sizes: dict[str, int], devices: list[jax.Device]) -> None:
    needed = math.prod(sizes.values())
    if needed <= len(devices):
        return
    # Only the axes above 1 are named: they are the keys to lower.
    asked = " x ".join(f"{key}={size}" for key, size in sizes.items() if size > 1)
    there = "1 device is" if len(devices) == 1 else f"{len(devices)} devices are"
    raise ConfigError(f"{asked} needs {needed} devices, but {there} there ({devices[0].platform})")
