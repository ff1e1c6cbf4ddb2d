"""Configuration of the hosts of a run: one process of the program on each."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from empg_jax.config.algorithm import Section


def seats_of(num: int | None) -> list[str]:
    """Return the overrides that plan a run for this number of hosts; none for None.

    Where the hosts would meet does not matter: nobody is asked.
    """
    return [] if num is None else [f"hosts.num={num}", "hosts.index=0", "hosts.coordinator=host0:8476"]


class HostsConfig(Section):
    """The hosts that train together; by default found from the scheduler's variables, else this one alone."""

    enabled: Literal["auto"] | bool = Field(
        "auto",
        description="Train over several hosts: with auto where the keys below, or the variables of Slurm, "
        "Open MPI, a Kubernetes JobSet or a TPU pod say so; true lets JAX search, false never does.",
    )
    coordinator: str | None = Field(
        None, description="HOST:PORT where host 0 answers, on every host alike; PORT + 1 is used, too."
    )
    num: int | None = Field(None, ge=1, description="Number of hosts.")
    index: int | None = Field(None, ge=0, description="Number of this host, from 0.")
    timeout: float = Field(
        60.0,
        gt=0,
        description="Seconds to wait for all hosts at the start, and after which a silent one is gone.",
    )

    @field_validator("coordinator")
    @classmethod
    def _check_coordinator(cls, value: str | None) -> str | None:
        if value is None:
            return None
        host, _, port = value.rpartition(":")
        is_name = bool(host) and not set(host) & set(" /@") and all(host.split("."))
        if not is_name or not port.isdigit() or not 1 <= int(port) <= 65534:  # PORT + 1 is used, too
            raise ValueError(
                f"hosts.coordinator={value} must be HOST:PORT, for example node0:8476, with a PORT from 1 to "
                "65534"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> HostsConfig:
        keys = {"coordinator": self.coordinator, "num": self.num, "index": self.index}
        given = [f"hosts.{key}={value}" for key, value in keys.items() if value is not None]
        if given and self.enabled is False:
            raise ValueError(f"{' '.join(given)} has no effect with hosts.enabled=false")
        if given and len(given) < len(keys):
            missing = ", ".join(f"hosts.{key}" for key, value in keys.items() if value is None)
            raise ValueError(f"{' '.join(given)} needs {missing}, too")
        if self.num is not None and self.index is not None and self.index >= self.num:
            raise ValueError(f"hosts.index={self.index} must be smaller than hosts.num={self.num}")
        return self
