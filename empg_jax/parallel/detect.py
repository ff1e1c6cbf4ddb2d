"""Whether this process is one of several hosts: by the keys, or by what the scheduler left."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Protocol

from empg_jax.errors import ConfigError
from empg_jax.parallel.rendezvous import Seat

# Variables of the schedulers from which JAX finds the hosts, with what says that there are several.
SCHEDULERS = {
    "Slurm": ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_hnp_uri"),
    "JobSet": ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX", "JOBSET_NAME"),
}


class Section(Protocol):
    """The keys of ``hosts.*``."""

    @property
    def enabled(self) -> str | bool:
        """Whether there are several: ``auto``, true or false."""

    @property
    def coordinator(self) -> str | None:
        """Where host 0 answers."""

    @property
    def num(self) -> int | None:
        """Number of hosts."""

    @property
    def index(self) -> int | None:
        """Number of this host."""

    @property
    def timeout(self) -> float:
        """Seconds to wait for the others."""


def find_seat(section: Section) -> tuple[Seat | None, list[int] | None]:
    """Return this process's place among the hosts (None: it is alone), and which devices are its own.

    Raises:
      ConfigError: ``hosts.enabled=true``, but there is neither an address nor a scheduler that JAX knows.
    """
    if section.enabled is False:
        return None, None
    if section.coordinator is not None:
        assert section.num is not None and section.index is not None  # checked with the configuration
        host, _, port = section.coordinator.rpartition(":")
        if section.num == 1:
            return None, None
        return Seat((host.strip("[]"), int(port)), section.num, section.index, section.timeout), None
    if section.enabled != "auto" or scheduler() is not None:
        return _ask_jax(section)
    return None, None


def scheduler(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the scheduler that started this process as one of several; None where there is none.

    Only environment variables are read, so a laptop waits for nothing.
    """
    for name, variables in SCHEDULERS.items():
        is_there = all(variable in environment for variable in variables)
        if is_there and (name == "JobSet" or int(environment[variables[0]]) > 1):
            return name
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU pod"
    return None


def has_machine(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether there is one process on each machine, so that all devices there are its own.

    JAX gives every process of Slurm and Open MPI one device, also one that is alone on a machine with eight.
    """
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        return environment["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    return environment.get("SLURM_NTASKS") == environment.get("SLURM_STEP_NUM_NODES", "")


def _ask_jax(section: Section) -> tuple[Seat | None, list[int] | None]:
    """Let JAX find coordinator, number and index."""
    from jax._src.clusters import ClusterEnv

    try:
        address, num, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(section.timeout)
        )
    except (RuntimeError, KeyError, ValueError, OSError) as error:
        raise ConfigError(
            f"hosts.enabled={section.enabled}: the other hosts cannot be found: {error}"
        ) from None
    if address is None or num is None or index is None:
        raise ConfigError(
            f"hosts.enabled={str(section.enabled).lower()}, but JAX finds no TPU pod, Slurm, Open MPI or "
            "JobSet here: set hosts.coordinator, hosts.num and hosts.index"
        )
    if num == 1:
        return None, None
    host, _, port = address.rpartition(":")
    is_limited = devices is not None and not has_machine()
    return Seat((host.strip("[]"), int(port)), num, index, section.timeout), list(
        devices or ()
    ) if is_limited else None
