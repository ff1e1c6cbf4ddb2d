"""The devices of learner and engine, and a check that this machine has those which are asked for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax

from empg_jax.errors import ConfigError

if TYPE_CHECKING:
    from empg_jax.config import Config


def learner_devices(config: Config) -> list[jax.Device]:
    """List the devices that the learner's mesh is made from."""
    own = [_learner_share(config, index) for index in range(jax.process_count())]
    if len(own) == 1:
        return own[0]
    # The same number from every host: each must take part in the collectives.
    wanted = math.prod(vars(config.mesh).values()) // len(own)
    return [device for devices in own for device in devices[:wanted]]


def _learner_share(config: Config, index: int) -> list[jax.Device]:
    """List the devices of one host that its engine does not take for itself."""
    devices = [device for device in jax.devices() if device.process_index == index]
    return devices[: len(devices) - (config.rollout.devices or 0)]


def engine_devices(config: Config) -> list[jax.Device]:
    """List the local devices that the engine's mesh is made from: the last ones, or all, shared."""
    return jax.local_devices()[-(config.rollout.devices or 0) :]


def check_devices(config: Config) -> None:
    """Check that there are enough devices for the learner and for the engine.

    Raises:
      ConfigError: there are too few devices; the message names the keys.
    """
    mesh, rollout = dict(vars(config.mesh)), config.rollout
    sizes = {f"mesh.{axis}": size for axis, size in mesh.items()}
    if (rollout.devices or 0) >= len(jax.local_devices()):
        raise ConfigError(
            f"rollout.devices={rollout.devices} leaves the learner none of the {len(jax.local_devices())} "
            f"devices of this machine ({jax.local_devices()[0].platform}): use fewer, or null to share them"
        )
    hosts = jax.process_count()
    if hosts > 1:
        _check_shared(sizes, hosts, min(len(_learner_share(config, index)) for index in range(hosts)))
    _check(sizes, learner_devices(config))
    _check({"rollout.data": rollout.data, "rollout.tensor": rollout.tensor}, engine_devices(config))


def _check_shared(sizes: dict[str, int], hosts: int, least: int) -> None:
    """Check that the learner's mesh takes equally many devices of every host."""
    needed = math.prod(sizes.values())
    if needed % hosts or needed // hosts > least:
        asked = " x ".join(f"{key}={size}" for key, size in sizes.items() if size > 1) or "mesh.data=1"
        raise ConfigError(
            f"{asked} needs {needed} devices, but {hosts} hosts with {least} each for the learner are there: "
            f"the product must be a multiple of {hosts}, at most {hosts * least}"
        )


def _check(sizes: dict[str, int], devices: list[jax.Device]) -> None:
    needed = math.prod(sizes.values())
    if needed <= len(devices):
        return
    # Only the axes above 1 are named: they are the keys to lower.
    asked = " x ".join(f"{key}={size}" for key, size in sizes.items() if size > 1)
    there = "1 device is" if len(devices) == 1 else f"{len(devices)} devices are"
    raise ConfigError(f"{asked} needs {needed} devices, but {there} there ({devices[0].platform})")
