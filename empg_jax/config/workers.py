"""Configuration of the processes that environments run in, and of what becomes of their failures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from empg_jax.config.algorithm import Section
from empg_jax.config.model import as_list


class WorkersConfig(Section):
    """The processes that run environments."""

    num: int = Field(2, ge=1, description="Environment worker processes.")
    backend: Literal["local", "ray"] = Field(
        "local", description="Where they run: on this machine, or on the nodes of a Ray cluster (extra: ray)."
    )
    ray_address: str | None = Field(
        None,
        description="HOST:PORT of the cluster; null: the one of RAY_ADDRESS, or the one of this machine.",
    )
    ray_resources: Annotated[dict[str, Annotated[float, Field(ge=0)]], Field(strict=False)] = Field(
        default_factory=lambda: {"CPU": 1.0},
        description="What a worker takes of its node, by Ray's names; for example {CPU: 1, cage: 1} keeps to "
        "nodes that offer cage.",
    )
    start_timeout: float = Field(30.0, gt=0, description="Seconds that a worker may take to start.")
    reset_timeout: float = Field(30.0, gt=0, description="Seconds that a reset may take.")
    step_timeout: float = Field(10.0, gt=0, description="Seconds that a step may take.")
    lanes: int = Field(
        64, ge=1, description="Commands that a worker runs at once; 1 runs its episodes one after another."
    )
    memory_limit_mb: int | None = Field(
        None,
        ge=0,
        description="Resident memory in MiB at which a worker is replaced; 0: no limit; null: half of the "
        "machine's memory, divided by the workers (none with workers.backend=ray).",
    )
    pass_env: Annotated[tuple[str, ...], Field(strict=False), BeforeValidator(as_list)] = Field(
        (), description="Environment variables that workers get besides the usual ones; * is a wildcard."
    )

    @model_validator(mode="after")
    def _check(self) -> WorkersConfig:
        for key in ("ray_address", "ray_resources"):
            value = getattr(self, key)
            if self.backend != "ray" and value != WorkersConfig.model_fields[key].get_default(
                call_default_factory=True
            ):
                raise ValueError(
                    f"workers.{key}={value} has no effect with workers.backend={self.backend}: set "
                    "workers.backend=ray"
                )
        return self


class FaultsConfig(Section):
    """What becomes of tasks, workers and the run when environments fail."""

    quarantine_after: int = Field(
        3, ge=1, description="Failures in a row, while others succeed, after which a task is not tried."
    )
    quarantine_episodes: int = Field(
        1000, ge=1, description="Episodes that end before a quarantined task is tried again."
    )
    breaker_window: int = Field(64, ge=1, description="Latest episodes that the breaker looks at.")
    breaker_share: float = Field(
        0.5, gt=0, le=1, description="Share of failures among these at which no new episode starts."
    )
    breaker_min: int = Field(
        8, ge=1, description="Failures that this takes at least; so many in a row always suffice."
    )
    probe: float = Field(5.0, gt=0, description="Seconds between two probes of an environment that is away.")
    patience: float = Field(
        900.0, ge=0, description="Seconds that it may stay away before the run stops, with a checkpoint."
    )
    start_attempts: int = Field(
        3, ge=1, description="Failed starts of a worker in a row that count as an environment that is away."
    )
    backoff: float = Field(
        0.1, ge=0, description="Seconds before a worker is started again; they double with each failure."
    )
    backoff_max: float = Field(5.0, ge=0, description="Largest such wait.")
