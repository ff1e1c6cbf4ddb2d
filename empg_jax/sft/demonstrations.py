"""Demonstrations: trajectories of tasks that an environment's own expert plays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from empg_envs import make_env
from empg_jax.errors import RunError
from empg_jax.run.assembly import Language
from empg_jax.types import Outcome, Status, Trajectory, Turn

if TYPE_CHECKING:
    from empg_jax.config import Config


class DemonstrationError(RunError):
    """A failure to record demonstrations."""


def record_demonstrations(
    config: Config,
    language: Language,
    count: int,
    *,
    advance: Callable[[int, dict[str, float]], None] = lambda n, values: None,
) -> list[Trajectory]:
    """Record the expert's episodes of ``count`` tasks of ``sft.split``.

    Each action is replaced by a random admissible one with probability ``sft.noise``. A demonstration with a
    turn whose prompt and response are longer than ``rollout.max_tokens`` is left out.

    Raises:
      DemonstrationError: the environment has no expert or fails, the run's parser rejects the expert's words,
        or no demonstration fits.
    """
    # The second number separates this stream from the other random streams of the run's seed.
    rng = np.random.default_rng((config.seed, 1))
    demonstrations = []
    with contextlib.closing(make_env(config.env.target, **config.env.options)) as env:
        if not hasattr(env, "expert_action"):
            raise DemonstrationError(
                f"environment {config.env.target} has no expert (no expert_action method): set sft.updates=0"
            )
        tasks = rng.permutation(env.num_tasks(config.sft.split))
        for number in range(count):
            task = int(tasks[number % len(tasks)])
            try:
                trajectory = _play(env, config, language, task, number, rng)
            except DemonstrationError:
                raise
            except Exception as error:  # an environment may raise anything; the message names it
                raise DemonstrationError(
                    f"environment {config.env.target} failed while its expert played task "
                    f"{config.sft.split}/{task}: {type(error).__name__}: {error}"
                ) from error
            if _longest(trajectory) <= config.rollout.max_tokens:
                demonstrations.append(trajectory)
            advance(1, {})
    if not demonstrations:
        raise DemonstrationError(
            f"none of {count} demonstrations fits rollout.max_tokens={config.rollout.max_tokens}"
        )
    return demonstrations


def _longest(trajectory: Trajectory) -> int:
    """Return the tokens of the longest turn: a row holds one turn, or a turn with all before it."""
    return max(len(turn.prompt_tokens) + len(turn.response_tokens) for turn in trajectory.turns)


def _check_answer(
    config: Config, language: Language, action: str, response: np.ndarray, info: Mapping[str, Any]
) -> None:
    """Check that the run reads the action in the response, as it would in one that is sampled.

    Raises:
      DemonstrationError: it does not, so that the policy would learn to be misunderstood.
    """
    said = language.tokenizer.decode(response.tolist())
    parsed = language.parser(said, info)
    # A closed vocabulary writes white space in its own way.
    if not parsed.is_valid or "".join(parsed.action.split()) != "".join(action.split()):
        if language.renderer.opens_thought:
            raise DemonstrationError(
                "the chat template opens a thought before every answer, and the expert of "
                f"{config.env.target} shows bare actions: set sft.updates=0, or model.chat_options or "
                "model.chat_template so that the prompt opens none"
            )
        raise DemonstrationError(
            f"the expert of {config.env.target} shows {said!r:.200}, in which the run's parser reads "
            f"{parsed.action!r:.200} ({'valid' if parsed.is_valid else 'invalid'}), not {action!r:.200}: set "
            "sft.updates=0, or a parser of bare actions (env.parser, env.prompt_options)"
        )


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
        _check_answer(config, language, action, response, info)
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
