"""Supervised warm start on an environment's expert or on chat files: a random policy never sees a reward.

Demonstrations become trajectories like any other, so packing, loss and update are the learner's own; the
"algorithm" is a cross-entropy on the agent's tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from empg_envs import make_env
from empg_jax.algorithms import Algorithm, loss_weights
from empg_jax.errors import ConfigError, RunError
from empg_jax.learner.batching import BatchShape, make_batch
from empg_jax.learner.state import TrainState, make_optimizer, restart_optimizer
from empg_jax.learner.update import Learner, make_learner
from empg_jax.models.decoder import DecoderConfig
from empg_jax.report.progress import Progress
from empg_jax.run.assembly import Language, micro_rows
from empg_jax.sft.chat_data import epoch_batch, load_chat_data
from empg_jax.text.chatfile import ChatDataError
from empg_jax.types import Batch, Credit, Outcome, Params, Scores, Status, Trajectory, Turn

if TYPE_CHECKING:
    from empg_jax.config import Config
    from empg_jax.config.sections import SftConfig


class DemonstrationError(RunError):
    """The environment's expert cannot give demonstrations."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """What a warm start learns from.

    Attributes:
      train: episodes or conversations.
      draw: the ones that an update takes, by number; depends on nothing but the update.
      max_turns: most turns that one has.
      rows: most rows that one needs.
      held_out: others, on which the loss is measured.
      fingerprint: hash of the data; empty where they were recorded by an expert (they are again on resume).
    """

    train: Sequence[Trajectory]
    draw: Callable[[int], Sequence[int]]
    max_turns: int
    rows: int = 1
    held_out: Sequence[Trajectory] = ()
    fingerprint: str = ""

    def note(self, record: dict[str, Any]) -> None:
        """Write into a run's record which data this is.

        Raises:
          ChatDataError: the record says that the run began with other data.
        """
        if record.get("sft_data", self.fingerprint) != self.fingerprint:
            raise ChatDataError("sft.data was changed since this run began: resume needs the same files")
        if self.fingerprint:
            record["sft_data"] = self.fingerprint


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


def gather_examples(config: Config, language: Language, progress: Progress) -> Examples:
    """The conversations of ``sft.data``, else demonstrations of the environment's expert.

    Raises:
      ConfigError: a file of ``sft.data`` does not exist.
      ChatDataError: it holds lines that are no conversations, or nothing to learn from.
      DemonstrationError: the expert cannot give demonstrations.
    """
    s = config.sft
    if s.data is not None:
        return _read_examples(config, s.data, language, progress)
    progress.phase("demonstrations", s.demonstrations, "episodes")
    demonstrations = record_demonstrations(config, language, s.demonstrations, advance=progress.advance)
    count = len(demonstrations)

    def draw(update: int) -> list[int]:
        rng = np.random.default_rng((config.seed, 2, update))
        return rng.choice(count, size=min(s.batch_size, count), replace=False).tolist()

    turns = config.env.max_turns
    return Examples(demonstrations, draw, turns, rows=turns if config.env.context == "window" else 1)


def _read_examples(config: Config, paths: Sequence[str], language: Language, progress: Progress) -> Examples:
    s = config.sft
    for path in paths:
        if not Path(path).expanduser().is_file():
            raise ConfigError(f"sft.data={path}: there is no such file (JSON lines, one conversation each)")
    progress.phase("chat data", _count_lines(paths), "lines")
    data = load_chat_data(
        paths,
        language.renderer,
        max_tokens=config.rollout.max_tokens,
        loss_on=s.loss_on,
        too_long=s.too_long,
        holdout=s.holdout,
        advance=progress.advance,
    )
    progress.close()  # the phase ends here, not with the compilation that comes next
    epochs = s.updates * s.batch_size / len(data.train)
    progress.message(
        f"{data.describe(config.rollout.max_tokens, s.too_long)}; {s.updates} updates of {s.batch_size} are "
        f"{epochs:.2g} epochs"
    )
    return Examples(
        data.train,
        functools.partial(epoch_batch, len(data.train), s.batch_size, config.seed),
        max_turns=max(data.train.max_turns, data.held_out.max_turns),
        held_out=data.held_out,
        fingerprint=data.train.fingerprint,
    )


def _count_lines(paths: Sequence[str]) -> int:
    count = 0
    for path in paths:
        with Path(path).expanduser().open("rb") as file:
            count += sum(1 for line in file if line.strip())
    return count


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
        turns.append(
            Turn(
                prompt_tokens=prompt,
                response_tokens=response,
                behavior_logprobs=zeros,
                entropies=zeros,
                reward=reward,
                version=0,
                anchor=0,
                is_valid=True,
                finish_reason="stop",
                observation=shown,
                response=action,
            )
        )
        held = np.concatenate([prompt, response])
        said = language.renderer.lead + action
        delta = context.follow(response.tolist(), said, True, action, observation, info)
    won = bool(info.get("won", False))
    outcome = Outcome(Status.TRAINED, "won" if won else "turn_limit")
    total = sum(turn.reward for turn in turns)
    return Trajectory(
        task=task,
        split=config.sft.split,
        group_id=number,
        member=0,
        turns=tuple(turns),
        outcome=outcome,
        episode_return=total,
        is_success=won,
        terminated=terminated,
        truncated=truncated,
    )


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
      config: the run's configuration (``sft.*``).
      model: decoder config.
      mesh: the learner's mesh.
      state: where to start; its optimizer is only used when ``first`` > 0.
      examples: what to learn from.
      base: the frozen parameters, where only adapters are trained.
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
    shape = _batch_shape(config, examples)
    learner = make_learner(
        model, make_cross_entropy(), optimizer, mesh, micro_rows=shape.micro_rows, base=base
    )
    if first == 0:
        state = restart_optimizer(state.params, optimizer, learner.shardings)
    for update in range(first, s.updates):
        chosen = [examples.train[index] for index in examples.draw(update)]
        batch, layout = make_batch(chosen, shape, seed=(config.seed, update))
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
        if examples.held_out and _is_measured(s, update):
            values["sft_eval_loss"] = measure_loss(learner, state.params, examples.held_out, shape)
        on_update(update, state, values)
    return state


def measure_loss(
    learner: Learner, params: Params, examples: Sequence[Trajectory], shape: BatchShape
) -> float:
    """Mean cross-entropy in nats over the learned tokens of all examples; every token weighs the same."""
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
