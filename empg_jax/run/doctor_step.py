"""A tiny state for the check of an installation: saved, restored, and trained for one step."""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from empg_jax.algorithms import make_algorithm
from empg_jax.learner.batching import BatchShape, make_batch
from empg_jax.learner.state import init_state, make_optimizer, state_shapes, state_shardings
from empg_jax.learner.update import make_learner
from empg_jax.models.decoder import DecoderConfig
from empg_jax.parallel.mesh import make_mesh
from empg_jax.rollout.record import make_trajectory
from empg_jax.run.checkpoint import Checkpoints

# Of a size that the attention kernels of accelerators take.
ROW, HEAD = 128, 64
MODEL = DecoderConfig(
    vocab_size=128,
    hidden_size=HEAD,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=HEAD,
    intermediate_size=HEAD,
)


@functools.cache
def _optimizer() -> optax.GradientTransformation:
    return make_optimizer(learning_rate=1e-3, final_learning_rate=1e-3, total_steps=1, schedule="constant")[0]


def _new_state() -> Any:
    mesh = make_mesh(devices=jax.local_devices()[:1])
    shardings = state_shardings(mesh, MODEL, _optimizer())
    return mesh, shardings, init_state(jax.random.key(0), MODEL, _optimizer(), shardings)


def check_checkpoint(folder: Path) -> str:
    """Write a state and read it back.

    Raises:
      CheckpointError: that fails.
      ValueError: what was read differs.
    """
    began = time.monotonic()
    _, shardings, state = _new_state()
    checkpoints = Checkpoints(folder / "checkpoints", keep=1, warn=lambda line: None)
    try:
        checkpoints.save(0, state, {"update": 0}, [])
        checkpoints.wait()
        restored = checkpoints.restore(shardings, state_shapes(MODEL, _optimizer()))
    finally:
        checkpoints.close()
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(restored.state), strict=True)
    if not all(np.array_equal(np.asarray(ours), np.asarray(theirs)) for ours, theirs in pairs):
        raise ValueError(f"a checkpoint in {folder} reads back other numbers than were written")
    return f"a checkpoint was written and restored in {time.monotonic() - began:.1f} s"


def check_step() -> str:
    """Compile the learner's programs and make one optimizer step.

    Raises:
      ArithmeticError: loss or gradient is not finite.
    """
    began = time.monotonic()
    mesh, _, state = _new_state()
    learner = make_learner(MODEL, make_algorithm("grpo_empg"), _optimizer(), mesh, micro_rows=2)
    turn = {"reward": 0.0, "valid": True, "tokens": 4, "entropy": 1.0}
    episodes = [
        make_trajectory(
            {"group_id": 0, "member": i, "turns": [{**turn, "reward": float(i)}, turn]}, is_transcript=True
        )
        for i in range(2)
    ]
    shape = BatchShape(trajectories=2, turns=2, row_tokens=ROW, micro_rows=2, max_rows=2, num_minibatches=1)
    batch, layout = make_batch(episodes, shape, seed=(0,))
    batch = learner.put(batch)
    scores = learner.recorded_scores(batch)
    credit = learner.credit(batch, scores)
    del layout
    _, metrics = learner.update(state, batch, scores, credit, np.int32(0), np.int32(1))
    found = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
    if not all(math.isfinite(value) for value in found.values()) or not found["grad_norm"] > 0:
        raise ArithmeticError(f"an optimizer step gave {found}")
    return f"an optimizer step was compiled and made in {time.monotonic() - began:.1f} s"
