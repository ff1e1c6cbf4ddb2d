"""Supervised warm start on an environment's expert, because a random policy never sees a reward.

Demonstrations become trajectories like any other, so packing, loss and update are the learner's own; the
"algorithm" is a cross-entropy on the agent's tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from empg_jax.algorithms import Algorithm, loss_weights
from empg_jax.assembly import Language, micro_rows
from empg_jax.learner.state import TrainState, make_optimizer, restart_optimizer
from empg_jax.learner.update import make_learner
from empg_jax.models.decoder import DecoderConfig
from empg_jax.replay.batching import BatchShape, make_batch
from empg_jax.types import Batch, Credit, Outcome, Scores, Status, Trajectory, Turn
from envs import make_env

if TYPE_CHECKING:
    from empg_jax.config import Config


class DemonstrationError(RuntimeError):
    """The environment's expert cannot give demonstrations."""


def make_cross_entropy() -> Algorithm:
    """Cross-entropy on sampled tokens as an `Algorithm`: loss ``-logprob``, every token weighing the same."""

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


def record_demonstrations(
    config: Config,
    language: Language,
    count: int,
    *,
    advance: Callable[[int, dict[str, float]], None] = lambda n, values: None,
) -> list[Trajectory]:
    """Let the expert play ``count`` tasks of ``sft.split``; with probability ``sft.noise`` a turn is random.

    A demonstration that would not fit ``rollout.max_tokens`` is left out.

    Raises:
      DemonstrationError: the environment has no expert or fails, or no demonstration fits.
    """
    env = make_env(config.env.target, **config.env.options)
    if not hasattr(env, "expert_action"):
        raise DemonstrationError(
            f"environment {config.env.target} has no expert (no expert_action method): set sft.updates=0"
        )
    rng = np.random.default_rng((config.seed, 1))
    tasks = rng.permutation(env.num_tasks(config.sft.split))
    demonstrations = []
    for number in range(count):
        task = int(tasks[number % len(tasks)])
        try:
            trajectory = _play(env, config, language, task, number, rng)
        except Exception as error:  # whatever an environment raises, in words that name it
            raise DemonstrationError(
                f"environment {config.env.target} failed while its expert played task "
                f"{config.sft.split}/{task}: {type(error).__name__}: {error}"
            ) from error
        if len(trajectory.turns[-1].prompt_tokens) + len(trajectory.turns[-1].response_tokens) <= (
            config.rollout.max_tokens
        ):
            demonstrations.append(trajectory)
        advance(1, {})
    env.close()
    if not demonstrations:
        raise DemonstrationError(
            f"none of {count} demonstrations fits rollout.max_tokens={config.rollout.max_tokens}"
        )
    return demonstrations


def _play(
    env: Any, config: Config, language: Language, task: int, number: int, rng: np.random.Generator
) -> Trajectory:
    context = language.make_context()
    observation, info = env.reset(seed=config.seed, split=config.sft.split, index=task)
    delta = context.start(observation, info)
    held = np.zeros(0, np.int32)
    turns: list[Turn] = []
    terminated = truncated = False
    while not (terminated or truncated or len(turns) >= config.env.max_turns):
        new = np.asarray(delta.tokens, np.int32)
        prompt = new if delta.is_fresh else np.concatenate([held, new])
        action = env.expert_action()
        if info.get("admissible") and rng.random() < config.sft.noise:
            action = info["admissible"][rng.integers(len(info["admissible"]))]
        response = np.asarray(language.renderer.encode_response(action), np.int32)
        shown = observation
        observation, reward, terminated, truncated, info = env.step(action)
        zeros = np.zeros(len(response), np.float32)
        turns.append(Turn(prompt, response, zeros, zeros, reward, 0, 0, True, "stop", shown, action))
        held = np.concatenate([prompt, response])
        delta = context.follow(response.tolist(), action, True, action, observation, info)
    won = bool(info.get("won", False))
    outcome = Outcome(Status.TRAINED, "won" if won else "turn_limit")
    total = sum(turn.reward for turn in turns)
    return Trajectory(
        task, config.sft.split, number, 0, tuple(turns), outcome, total, won, terminated, truncated
    )


def warm_start(
    config: Config,
    model: DecoderConfig,
    mesh: Mesh,
    state: TrainState,
    demonstrations: list[Trajectory],
    *,
    first: int = 0,
    on_update: Callable[[int, TrainState, dict[str, float]], None],
) -> TrainState:
    """Train on demonstrations for ``sft.updates`` updates (AdamW, cosine decay).

    Args:
      config: the run's configuration (``sft.*``).
      model: decoder config.
      mesh: the learner's mesh.
      state: where to start; its optimizer is only used when ``first`` > 0.
      demonstrations: expert episodes.
      first: update to go on with (0: from the start, with a fresh optimizer).
      on_update: told of every update: its number, the state after it, its metrics.

    Returns:
      The last state.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    s = config.sft
    optimizer, schedule = make_optimizer(
        learning_rate=s.learning_rate,
        final_learning_rate=s.final_learning_rate,
        total_steps=s.updates,
        schedule="cosine",
        grad_clip=config.train.grad_clip,
        beta2=config.train.beta2,
    )
    shape = _batch_shape(config)
    learner = make_learner(model, make_cross_entropy(), optimizer, mesh, micro_rows=shape.micro_rows)
    if first == 0:
        state = restart_optimizer(state.params, optimizer, learner.shardings)
    for update in range(first, s.updates):
        rng = np.random.default_rng((config.seed, 2, update))
        chosen = rng.choice(len(demonstrations), size=min(s.batch_size, len(demonstrations)), replace=False)
        batch, layout = make_batch([demonstrations[i] for i in chosen], shape, seed=(config.seed, update))
        batch = learner.put(batch)
        scores = learner.recorded_scores(batch)
        credit = learner.credit(batch, scores)
        start, stop = layout.bounds[0]
        state, metrics = learner.update(state, batch, scores, credit, np.int32(start), np.int32(stop))
        values = {"sft_loss": float(metrics["loss"]), "learning_rate": float(schedule(update))}
        if not np.isfinite(values["sft_loss"]):
            raise FloatingPointError(
                f"the loss of warm-start update {update} is {values['sft_loss']}: lower sft.learning_rate "
                f"(now {s.learning_rate:g})"
            )
        on_update(update, state, values)
    return state


def _batch_shape(config: Config) -> BatchShape:
    size, turns = config.sft.batch_size, config.env.max_turns
    return BatchShape(
        trajectories=size,
        turns=turns,
        row_tokens=config.rollout.max_tokens,
        micro_rows=micro_rows(config),
        max_rows=size * (turns if config.env.context == "window" else 1),
        num_minibatches=1,
    )


def run_sft(config: Config) -> Path:
    """The warm start alone, as a run: the same folder and checkpoints as training with no RL update."""
    from empg_jax.trainer import train

    return train(config.model_copy(update={"train": config.train.model_copy(update={"updates": 0})}))
