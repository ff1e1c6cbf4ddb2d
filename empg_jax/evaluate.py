"""Held-out evaluation of a policy: a run on disk, one of its checkpoints, a model, or one behind HTTP."""

from __future__ import annotations

import contextlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from empg_jax.engine.interface import SamplingEngine
from empg_jax.errors import ConfigError
from empg_jax.learner.fingerprint import checksum
from empg_jax.report.evaluation import estimate_success
from empg_jax.report.progress import Progress
from empg_jax.rollout.collector import Collector
from empg_jax.rollout.context import make_context
from empg_jax.rollout.endpoint import Endpoint, EndpointEngine, MessageRenderer
from empg_jax.rollout.evaluator import Evaluation, EvaluationError, Evaluator
from empg_jax.rollout.thoughts import ThoughtfulParser
from empg_jax.run.announcing import say_once
from empg_jax.run.assembly import make_prompts
from empg_jax.run.attempts import Attempts, identify
from empg_jax.run.environment import eval_panels, find_spec
from empg_jax.run.process import prepare_jax
from empg_jax.run.sampling import (
    EVALUATION_STREAM,
    filter_of,
    make_evaluator,
    make_pool,
    make_rules,
    make_sampler,
)
from empg_jax.run.saved import SavedRun, open_new, open_saved
from empg_jax.run.server import closing_sampler
from empg_jax.run.splits import count_panels
from empg_jax.text.chat import ChatRenderer

if TYPE_CHECKING:
    from empg_jax.config import Config


def evaluate_run(
    path: Path, overrides: list[str], *, attempts: int = 1, out: Path | None = None
) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run, or one checkpoint of it (``RUN/checkpoints/STEP``).

    Args:
      path: run folder, or a step's folder inside its ``checkpoints``.
      overrides: dotted overrides of the run's configuration, for example ``eval.tasks=512``.
      attempts: attempts at each task, each with sampling keys of its own.
      out: folder for the report, which also keeps finished attempts: an evaluation that was cut off goes on
        there.

    Returns:
      ``eval_*`` metrics, ``eval_tasks``, ``eval_resumed`` (attempts that an earlier call finished),
      ``split``, ``step``, ``source``, ``env``, ``env_options``; what
      `empg_jax.report.evaluation.estimate_success` tells; for a model from ``model.path`` also
      ``text_logprob``, the weights' log-probability of a fixed text in nats per token.

    Raises:
      CheckpointError: there is no run or no usable checkpoint at the path.
      ConfigError: an override does not fit, or the run is being trained through the server of
        ``rollout.url``.
      EvaluationError: every attempt failed for a cause outside the policy.
    """
    saved = open_saved(path, overrides, warn=_warn, samples=True)
    return _evaluate(saved, attempts, out, str(path))


def evaluate_model(
    source: str, config: Config, *, attempts: int = 1, out: Path | None = None
) -> dict[str, Any]:
    """Evaluate the weights that a configuration starts from; otherwise as `evaluate_run`.

    Args:
      source: the model's name for the report.
      config: a configuration with ``model.path`` or ``model.preset``.
      attempts: attempts at each task.
      out: folder for the report and for finished attempts.
    """
    return _evaluate(open_new(_with_fewer_slots(config, attempts)), attempts, out, source)


def evaluate_endpoint(
    url: str,
    config: Config,
    *,
    attempts: int = 1,
    out: Path | None = None,
    model: str | None = None,
    key: str | None = None,
) -> dict[str, Any]:
    """Evaluate the policy behind a server that speaks OpenAI's chat completions.

    The environment's prompts go there as messages; the server's template makes tokens of them. Otherwise as
    `evaluate_run`, with ``model``, the name there, and without a step. Where the server is one of
    ``empg-jax serve``, entropies are told, and a thought that the prompt opened and nothing ended is an
    invalid action; of another server's responses nobody here knows that they begin inside a thought.

    Args:
      url: the server's address.
      config: environment, prompts and sampling; its model has no part.
      attempts: attempts at each task.
      out: folder for the report and for finished attempts.
      model: the model's name there; None takes the only one.
      key: the bearer token, or None.

    Raises:
      ConfigError: the environment's program calls the policy itself, or several models are there.
      EndpointError: the server cannot be reached, or refuses or fails to answer.
    """
    spec = find_spec(config)
    if spec.has_calls:
        raise ConfigError(
            f"{config.env.target} runs programs that call the policy themselves; point them at {url} instead"
        )
    endpoint = Endpoint(
        url, model=model, key=key, sampling=_sampling(config), timeout=config.rollout.episode_timeout
    )
    prompts, parser = make_prompts(config, spec)
    parser = ThoughtfulParser(parser, lambda: endpoint.opens_thought)
    renderer = cast(ChatRenderer, MessageRenderer())
    slots = config.rollout.slots or config.rollout.tasks_per_update * config.rollout.group_size
    with (
        EndpointEngine(endpoint, slots=slots, seed=config.seed) as server,
        make_pool(config, say_once(_warn)) as pool,
    ):
        engine = cast(SamplingEngine, server)  # it has what collector and evaluator ask of one
        collector = Collector(
            engine,
            pool,
            make_context(config.env.context, prompts, renderer, config.env.history),
            parser,
            lambda tokens: "",  # responses bring their texts
            make_rules(config),
            seed=config.seed,
            stream=EVALUATION_STREAM,
            episode_timeout=config.rollout.episode_timeout,
        )
        evaluator = Evaluator(
            collector,
            engine,
            temperature=config.eval.temperature,
            token_filter=filter_of(config.eval),
            panels=count_panels(config, pool),
            attempts=attempts,
            tell=pool.tell,
        )
        # Only now is the folder made: a split that does not exist was refused before.
        with Attempts(out, identify(config, url, endpoint.model, attempts)) as kept:
            if kept.done:
                _warn(f"they count as those of {url}: if it serves other weights now, use another --out")
            result = _play(config, evaluator, attempts, kept, None, 0)
            found = _describe(config, evaluator, result, kept, attempts)
            if math.isnan(found["eval_entropy"]):
                del found["eval_entropy"]
            found |= {"source": url, "model": endpoint.model}
            kept.finish(result.trajectories, found)
    return found


def _sampling(config: Config) -> dict[str, Any]:
    """Return the fields of a request; those that not every server knows only where they are needed."""
    e, r = config.eval, config.rollout
    fields = {"temperature": e.temperature, "max_tokens": r.max_response_tokens}
    optional = {"top_p": (e.top_p, 1.0), "top_k": (e.top_k, 0), "min_p": (e.min_p, 0.0)}
    fields |= {name: value for name, (value, off) in optional.items() if value != off}
    return {**fields, **({"stop": list(r.stop)} if r.stop else {})}


def _with_fewer_slots(config: Config, attempts: int) -> Config:
    """Take no more slots than there are episodes: each has room for a whole conversation."""
    r = config.rollout
    slots = r.slots or r.tasks_per_update * r.group_size
    episodes = config.eval.tasks * len(eval_panels(config)) * attempts
    needed = -(-episodes // r.data) * r.data  # the slots are split over these devices
    return config.model_copy(update={"rollout": r.model_copy(update={"slots": min(slots, needed)})})


def _evaluate(saved: SavedRun, attempts: int, out: Path | None, source: str) -> dict[str, Any]:
    config = saved.config
    prepare_jax(config)
    engine = make_sampler(config, saved.model, saved.language.tokenizer, saved.base)
    if attempts > 1 and config.eval.temperature == 0:
        _warn("eval.temperature=0: the attempts at a task differ only where its environment does")
    policy = () if out is None else (saved.step, checksum(saved.params), saved.base and checksum(saved.base))
    with contextlib.ExitStack() as stack:
        with closing_sampler(engine), make_pool(config, say_once(_warn)) as pool:
            evaluator = make_evaluator(
                config, engine, pool, saved.language, first_handle=0, attempts=attempts
            )
            kept = stack.enter_context(Attempts(out, identify(config, attempts, *policy)))
            result = _play(config, evaluator, attempts, kept, engine.place(saved.params), saved.step)
        found = _describe(config, evaluator, result, kept, attempts)
        if config.model.path is not None:
            found["text_logprob"] = saved.text_logprob()
        found |= {"step": saved.step, "source": source}
        kept.finish(result.trajectories, found)
    return found


def _play(
    config: Config, evaluator: Evaluator, attempts: int, kept: Attempts, placed: Any, step: int
) -> Evaluation:
    """Make the attempts that are not kept yet, and keep all."""
    for panel, count in evaluator.panels.items():
        if count < config.eval.tasks:
            _warn(f"eval.tasks={config.eval.tasks}: {panel} has {count} tasks; all of them are attempted")
    total = evaluator.num_tasks * attempts
    if kept.done:
        _warn(f"going on: {len(kept.done)} of {total} attempts were finished before")
    with Progress(config.log.progress) as progress:
        progress.phase("evaluation", total, "episodes")
        result = evaluator.run(placed, step, advance=progress.advance, done=kept.done, keep=kept.keep)
    if not result.trajectories:
        raise EvaluationError(
            f"none of the {evaluator.num_tasks} tasks of {config.env.eval_split} could be attempted; the "
            f"last failure: {evaluator.last_failure}"
        )
    if result.missing:
        lost = f"{len(result.missing)} of {total} attempts have no result"
        _warn(f"{lost}; the last failure: {evaluator.last_failure}")
    return result


def _describe(
    config: Config, evaluator: Evaluator, result: Evaluation, kept: Attempts, attempts: int
) -> dict[str, Any]:
    return {
        **result.metrics,
        "eval_tasks": evaluator.num_tasks,
        "eval_resumed": len(kept.done),
        "split": config.env.eval_split,
        "env": config.env.target,
        "env_options": config.model_dump(mode="json")["env"]["options"],
        **estimate_success(result.trajectories, attempts),
    }


def _warn(line: str) -> None:
    print(line, file=sys.stderr)
