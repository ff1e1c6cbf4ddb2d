"""Configuration of the policy behind HTTP."""

from __future__ import annotations

from pydantic import Field

from empg_jax.config.algorithm import Section


class ServeConfig(Section):
    """The policy behind HTTP (``empg-jax serve``)."""

    name: str | None = Field(
        None, min_length=1, description="Name of the model on the wire (default: that of its folder)."
    )
    slots: int = Field(16, ge=1, description="Conversations in the cache: busy ones, and ones that are kept.")
    max_tokens: int | None = Field(
        None,
        ge=2,
        description="Longest conversation in tokens (default rollout.max_tokens of a run, else 4096, or "
        "max_position_embeddings of the model where that is less).",
    )
    max_waiting: int = Field(
        256, ge=0, description="Responses that may wait for a slot; further requests get status 429."
    )
    max_body_mb: int = Field(8, ge=1, description="Largest body of a request in MiB.")
    warm_up: bool = Field(True, description="Compile every program before the first request.")
    save_dir: str = Field(
        "runs/tinker", min_length=1, description="Folder of weights that clients save by name (--train)."
    )
    snapshots: int = Field(
        4, ge=1, description="Different weights kept in memory for sampling clients (--train)."
    )
    gap_timeout: float = Field(
        60.0, gt=0, description="Seconds that a training request waits for missing ones before it (--train)."
    )
    session_timeout: float = Field(
        60.0, gt=0, description="Silence of a client after which another may train (--train)."
    )
