"""The state of a checkpoint, read with the optimizer of the phase in which it was written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jax.sharding import Mesh

from empg_jax.learner.state import state_shapes, state_shardings
from empg_jax.learner.update import Learner
from empg_jax.models.decoder import DecoderConfig
from empg_jax.run.assembly import make_rl_optimizer, make_sft_optimizer
from empg_jax.run.checkpoint import Checkpoints, Restored

if TYPE_CHECKING:
    from empg_jax.config import Config


def restore_state(
    config: Config, checkpoints: Checkpoints, learner: Learner, step: int | None = None
) -> Restored:
    """Load the newest usable checkpoint of a run, or the one of ``step``; see `load_state`."""
    return load_state(config, checkpoints, learner.model, learner.mesh, step)


def load_state(
    config: Config, checkpoints: Checkpoints, model: DecoderConfig, mesh: Mesh, step: int | None = None
) -> Restored:
    """Load the newest usable checkpoint of a run, or the one of ``step``, onto a mesh.

    The optimizers of warm start and RL may keep states of different structure, so both are described.

    Raises:
      CheckpointError: no checkpoint can be read.
    """
    rl, sft = (
        (state_shardings(mesh, model, optimizer), state_shapes(model, optimizer))
        for optimizer, _ in (make_rl_optimizer(config), make_sft_optimizer(config))
    )
    return checkpoints.restore(*rl, warm_start=sft, step=step)
