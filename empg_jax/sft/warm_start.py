"""The supervised warm start. It is needed because a random policy hardly ever gets a reward.

Its examples are trajectories, so that packing, loss and update are the learner's own. Its "algorithm" is the
cross-entropy of the agent's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from empg_jax.algorithms import Algorithm, loss_weights
from empg_jax.learner.batching import BatchShape, make_batch
from empg_jax.learner.state import TrainState, restart_optimizer
from empg_jax.learner.update import Learner, make_learner
from empg_jax.models.decoder import DecoderConfig
from empg_jax.run.assembly import make_sft_optimizer, micro_rows
from empg_jax.run.guards import TrainingError
from empg_jax.sft.examples import Examples
from empg_jax.types import Batch, Credit, Params, Scores, Trajectory

if TYPE_CHECKING:
    from empg_jax.config import Config
    from empg_jax.config.sections import SftConfig


def make_cross_entropy() -> Algorithm:
    """Make the `Algorithm` with the loss ``-logprob``, averaged over all trained tokens."""

    def credit(batch: Batch, scores: Scores) -> Credit:
        del scores
        weights = loss_weights(batch.loss_mask, mode="token-mean")
        return Credit(jnp.zeros_like(weights), weights, {})

    def loss(
        logprobs: jax.Array, entropies: jax.Array, batch: Batch, scores: Scores, advantages: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del entropies, batch, scores, advantages
        return -logprobs, {}

    return Algorithm(credit=credit, loss=loss)


def warm_start(
    config: Config,
    model: DecoderConfig,
    mesh: Mesh,
    state: TrainState,
    examples: Examples,
    *,
    base: Params | None = None,
    first: int = 0,
    on_update: Callable[[int, TrainState, dict[str, float]], None],
) -> TrainState:
    """Train on examples for ``sft.updates`` updates (AdamW, cosine decay).

    Args:
      config: the run's configuration (``sft.*``, and the optimizer's ``train.*``).
      model: decoder config.
      mesh: the learner's mesh.
      state: the initial state, which is donated; its optimizer state is used only if ``first`` > 0.
      examples: the training and held-out examples.
      base: the frozen parameters if only adapters are trained, else None.
      first: index of the first update to run; 0 starts with a fresh optimizer.
      on_update: called after every update with its index, the new state, and its metrics.

    Returns:
      The final state.

    Raises:
      TrainingError: the loss is not finite.
    """
    s = config.sft
    optimizer, schedule = make_sft_optimizer(config)
    shape = _batch_shape(config, examples)
    learner = make_learner(
        model, make_cross_entropy(), optimizer, mesh, micro_rows=shape.micro_rows, base=base
    )
    if first == 0:
        state = restart_optimizer(state.params, optimizer, learner.shardings)
    for update in range(first, s.updates):
        # The draw depends only on the update, so that a resumed run sees the same examples.
        chosen = [examples.train[index] for index in examples.draw(update)]
        batch, layout = make_batch(chosen, shape, seed=(config.seed, update))
        batch = learner.put(batch)
        # The cross-entropy uses no scores, so the recorded zeros suffice and no forward pass is needed.
        scores = learner.recorded_scores(batch)
        credit = learner.credit(batch, scores)
        start, stop = layout.bounds[0]
        state, metrics = learner.update(state, batch, scores, credit, np.int32(start), np.int32(stop))
        values = {"sft_loss": float(metrics["loss"]), "learning_rate": float(schedule(update))}
        if not np.isfinite(values["sft_loss"]) or metrics["nonfinite"]:
            raise TrainingError(
                f"the loss of warm-start update {update} is {values['sft_loss']} with a gradient of norm "
                f"{float(metrics['grad_norm'])}: lower sft.learning_rate (now {s.learning_rate:g})"
            )
        if examples.held_out and _is_measured(s, update):
            values["sft_eval_loss"] = measure_loss(learner, state.params, examples.held_out, shape)
        on_update(update, state, values)
    return state


def measure_loss(
    learner: Learner, params: Params, examples: Sequence[Trajectory], shape: BatchShape
) -> float:
    """Compute the mean cross-entropy in nats over the trained tokens of all examples."""
    total, tokens = 0.0, 0
    for start in range(0, len(examples), shape.trajectories):
        chosen = [examples[index] for index in range(start, min(start + shape.trajectories, len(examples)))]
        host_batch, layout = make_batch(chosen, shape, seed=(0,))
        batch = learner.put(host_batch)
        scores = learner.score(params, params, batch, np.int32(layout.bounds[0][1]))
        total -= float(_sum_logprobs(scores.old_logprobs, batch.loss_mask))
        tokens += int(host_batch.loss_mask.sum())
    return total / tokens


@jax.jit
def _sum_logprobs(logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask, logprobs, jnp.zeros_like(logprobs)))


def _is_measured(s: SftConfig, update: int) -> bool:
    is_due = s.eval_every > 0 and (update + 1) % s.eval_every == 0
    return is_due or update + 1 == s.updates


def _batch_shape(config: Config, examples: Examples) -> BatchShape:
    return BatchShape(
        trajectories=config.sft.batch_size,
        turns=examples.max_turns,
        row_tokens=config.rollout.max_tokens,
        micro_rows=micro_rows(config),
        max_rows=config.sft.batch_size * examples.rows,
        num_minibatches=1,
    )
