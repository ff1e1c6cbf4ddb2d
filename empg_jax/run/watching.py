"""A policy that plays one episode in the terminal, turn by turn, with the entropy of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from empg_jax.engine.engine import Engine, Response
from empg_jax.errors import ConfigError
from empg_jax.hf.presets import PRESETS
from empg_jax.rollout.context import EpisodeContext, PromptDelta
from empg_jax.run.environment import eval_panels, find_spec
from empg_jax.run.folder import split_checkpoint
from empg_jax.run.process import prepare_jax
from empg_jax.run.sampling import make_engine, make_watches
from empg_jax.run.saved import SavedRun, open_new, open_saved
from empg_jax.run.terminal import Say, choose_task, open_env, plain, play_task

STREAM = 3  # keeps the sampling keys apart from those of training, evaluation and serving


def watch_episode(
    target: str,
    source: str,
    changes: Sequence[str],
    *,
    split: str | None,
    task: int | None,
    seed: int,
    say: Say,
) -> None:
    """Let a policy play one episode and tell of every turn and of the outcome.

    Args:
      target: name or entry point of the environment.
      source: folder of a run or checkpoint, a Hugging Face folder or hub id, or a preset (random weights).
      changes: options of the environment as ``key=value``, and dotted overrides of the configuration.
      split: panel of tasks (default ``env.eval_split``).
      task: number of the task (default: drawn with ``seed``).
      seed: seed of the episode and of the sampling.
      say: receives the lines to show.

    Raises:
      ConfigError: there is no such policy, environment, option, panel or task.
      CheckpointError: the run has no usable checkpoint.
      RunError: the environment fails.
    """
    saved = _open(target, source, changes, say)
    config = saved.config
    if find_spec(config).has_calls:
        raise ConfigError(
            f"--policy: the agent of {target} is a program of its own; empg-jax rollout plays its episodes"
        )
    with open_env(target, config.env.options) as env:
        where = choose_task(env, target, eval_panels(config)[0] if split is None else split, task, seed)
        play_task(env, target, where, PolicyAgent(saved, (seed, where[1]), say), seed=seed, say=say)


def _open(target: str, source: str, changes: Sequence[str], say: Say) -> SavedRun:
    """Load the policy, with the prompts that it was trained with in this environment."""
    # Imported here, because it loads pydantic, which only this function needs.
    from empg_jax.config import load_config
    from empg_jax.config.model_source import load_for_model

    options = [each if "." in each.partition("=")[0] else f"env.options.{each}" for each in changes]
    run_dir, _ = split_checkpoint(Path(source))
    if not (run_dir / "config.yaml").is_file():
        return open_new(
            load_for_model(source, options, env=target, config=None, presets=list(PRESETS), say=say)
        )
    if load_config(run_dir / "config.yaml").env.target != target:
        say(f"{source} was trained in another environment, whose prompts are not those of {target}")
        named = (
            ["env.name=null", f"env.entry_point={target}"]
            if ":" in target
            else [f"env.name={target}", "env.entry_point=null"]
        )
        options = [*named, *options]
    return open_saved(Path(source), options, warn=say)


class PolicyAgent:
    """A policy as the agent of one episode, with the prompts of training.

    Args:
      saved: the policy.
      ids: numbers of the episode, from which the sampling keys are folded.
      say: receives the lines to show.
    """

    def __init__(self, saved: SavedRun, ids: tuple[int, int], say: Say) -> None:
        self._max_turns, self._language, self._ids, self._say = (
            saved.config.env.max_turns,
            saved.language,
            ids,
            say,
        )
        self._step, self._engine = saved.step, _open_engine(saved)
        self._context: EpisodeContext = saved.language.make_context()
        self._make_watch = make_watches(saved.config, saved.language.renderer)
        self._turns = 0
        self._last: tuple[Response, str, str] | None = None  # the last turn: response, its text, its action

    def start(self) -> None:
        """Tell which weights act."""
        self._say(f"the policy acts, with the weights of update {self._step}")

    def act(self, observation: str, info: Mapping[str, Any]) -> str | None:
        """Sample a response and return its action; None when the turns or the room for tokens are used up."""
        if self._turns >= self._max_turns:
            self._say(f"that were the {self._max_turns} turns of env.max_turns")
            return None
        delta = self._read(observation, info)
        if self._engine.room(0, len(delta.tokens), is_fresh=delta.is_fresh) < 1:
            self._say("the conversation is full (rollout.max_tokens)")
            return None
        ids = (STREAM, *self._ids, self._turns)
        watch = self._make_watch()
        self._engine.submit(0, delta.tokens, is_fresh=delta.is_fresh, ids=ids, watch=watch)
        responses: Sequence[Response] = ()
        while not responses:
            responses = self._engine.step()
        text = self._language.renderer.decode_response(responses[0].tokens.tolist())
        parsed = self._language.parser(text, info)
        self._turns += 1
        self._last = responses[0], text, parsed.action
        self._tell(responses[0], text, parsed.action, parsed.is_valid)
        return parsed.action

    def _read(self, observation: str, info: Mapping[str, Any]) -> PromptDelta:
        if self._last is None:
            return self._context.start(observation, info)
        response, text, action = self._last
        has_stopped = response.finish_reason == "stop"
        return self._context.follow(response.tokens.tolist(), text, has_stopped, action, observation, info)

    def _tell(self, response: Response, text: str, action: str, is_valid: bool) -> None:
        if text.strip() != action.strip():
            self._say(plain(text))
        entropies = response.entropies
        self._say(f"> {plain(action)}{'' if is_valid else '  (not valid)'}")
        mean, most = float(entropies.mean()), float(entropies.max())
        self._say(f"  {len(response.tokens)} tokens, entropy {mean:.3f} nats, at most {most:.3f}")


def _open_engine(saved: SavedRun) -> Engine:
    """Build an engine for one conversation on one device."""
    prepare_jax(saved.config)
    one = {"slots": 1, "data": 1, "tensor": 1, "devices": None}
    rollout = saved.config.rollout.model_copy(update=one)
    config = saved.config.model_copy(update={"rollout": rollout})
    engine = make_engine(config, saved.model, saved.language.tokenizer.stop_ids)
    if saved.base is not None:
        engine.base = engine.place(saved.base)
    engine.load(saved.params, saved.step)
    return engine
