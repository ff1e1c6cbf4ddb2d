"""The devices of learner and engine, and a check that this machine has those which are asked for."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
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
    devices = jax.devices()
    counts = collections.Counter(device.process_index for device in devices)
    check_counts(config, list(counts.values()), devices[0].platform)


def check_counts(config: Config, counts: Sequence[int], kind: str) -> None:
    """Check that hosts with so many devices have enough for the learner and for the engine.

    Args:
      config: the configuration.
      counts: number of devices of each host.
      kind: what devices they are, for the message.

    Raises:
      ConfigError: there are too few; the message names the keys.
    """
    mesh, rollout, hosts, least = dict(vars(config.mesh)), config.rollout, len(counts), min(counts)
    sizes = {f"mesh.{axis}": size for axis, size in mesh.items()}
    where, own = "there" if hosts == 1 else "on each host", rollout.devices or 0
    if own >= least:
        raise ConfigError(
            f"rollout.devices={own} leaves the learner none of the {least} devices that are {where} "
            f"({kind}): use fewer, or null to share them"
        )
    if hosts > 1:
        _check_shared(sizes, hosts, least - own)
    _check(sizes, hosts * (least - own), f"there ({kind})")
    engine = {"rollout.data": rollout.data, "rollout.tensor": rollout.tensor}
    _check(engine, own or least, f"{where} ({kind})")


def check_planned(config: Config, devices: int | None = None) -> None:
    """Check what a run checks of its hosts and devices, without them.

    Args:
      config: the configuration; ``hosts.num`` is the number of hosts, one by default.
      devices: number of devices of all hosts; None: as many as it takes.

    Raises:
      ConfigError: the run would be refused; the message names the keys.
    """
    hosts, kind = config.hosts.num or 1, "planned" if devices is None else f"--devices {devices}"
    check_shares(config, hosts)
    there = count_devices(config) if devices is None else devices
    check_counts(config, [there // hosts] * hosts, kind)


def count_devices(config: Config) -> int:
    """Count the devices of all hosts together that a configuration takes, equally many of each."""
    hosts, r = config.hosts.num or 1, config.rollout
    learner = -(-math.prod(vars(config.mesh).values()) // hosts)
    return hosts * (learner + r.devices if r.devices else max(learner, r.data * r.tensor))


def check_shares(config: Config, num_hosts: int) -> None:
    """Check that the work can be shared by so many hosts, before anything is written.

    Raises:
      ConfigError: it cannot; the message names the key.
    """
    if num_hosts == 1:
        return
    tasks = config.rollout.tasks_per_update
    if tasks % num_hosts:
        right = -(-tasks // num_hosts) * num_hosts
        raise ConfigError(
            f"rollout.tasks_per_update={tasks} groups cannot be shared by {num_hosts} hosts evenly: use a "
            f"multiple, for example rollout.tasks_per_update={right}"
        )
    if config.rollout.schedule is not None:
        raise ConfigError(
            f"rollout.schedule={config.rollout.schedule} repeats a run of one host; here are {num_hosts}"
        )


def _check_shared(sizes: dict[str, int], hosts: int, least: int) -> None:
    """Check that the learner's mesh takes equally many devices of every host."""
    needed = math.prod(sizes.values())
    if needed % hosts or needed // hosts > least:
        asked = " x ".join(f"{key}={size}" for key, size in sizes.items() if size > 1) or "mesh.data=1"
        raise ConfigError(
            f"{asked} needs {needed} devices, but {hosts} hosts with {least} each for the learner are there: "
            f"the product must be a multiple of {hosts}, at most {hosts * least}"
        )


def _check(sizes: dict[str, int], count: int, where: str) -> None:
    needed = math.prod(sizes.values())
    if needed <= count:
        return
    # Only the axes above 1 are named: they are the keys to lower.
    asked = " x ".join(f"{key}={size}" for key, size in sizes.items() if size > 1)
    there = "1 device is" if count == 1 else f"{count} devices are"
    raise ConfigError(f"{asked} needs {needed} devices, but {there} {where}")
