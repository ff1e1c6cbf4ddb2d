"""From a configuration to the parts of a run: one small function per part, no state of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from empg_jax.algorithms import Algorithm, make_algorithm
from empg_jax.models.decoder import DecoderConfig
from empg_jax.replay.batching import BatchShape
from empg_jax.rollout.collector import Collector
from empg_jax.rollout.context import ContextFactory, make_context
from empg_jax.rollout.engine import Engine, EngineConfig
from empg_jax.rollout.episode import EpisodeRules
from empg_jax.rollout.pool import EnvPool, PoolTimeouts
from empg_jax.text.builtin import build_phrase_tokenizer
from empg_jax.text.chat import ChatRenderer
from empg_jax.text.tokenizer import Tokenizer, load_tokenizer
from envs import resolve_spec
from envs.base import ActionParser

if TYPE_CHECKING:
    from empg_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Language:
    """How text and tokens meet in a run: tokenizer, chat format, what is shown, what is understood."""

    tokenizer: Tokenizer
    renderer: ChatRenderer
    make_context: ContextFactory
    parser: ActionParser


def make_language(config: Config, tokenizer_path: Path | None = None) -> Language:
    """Tokenizer, renderer, context and parser.

    Args:
      config: the configuration.
      tokenizer_path: a saved tokenizer to use instead of what the configuration names (a run's own).

    Raises:
      ValueError: no tokenizer is named and the environment offers no vocabulary to build one from.
    """
    spec = resolve_spec(config.env.target)
    path = tokenizer_path or config.model.tokenizer or config.model.path
    if path is not None:
        tokenizer = load_tokenizer(path)
    elif spec.phrases is not None:
        tokenizer = build_phrase_tokenizer(spec.phrases(**config.env.options))
    else:
        raise ValueError(
            f"environment {config.env.target} has no closed vocabulary, so no tokenizer can be built for it: "
            "set model.tokenizer (a folder) or model.path"
        )
    renderer = ChatRenderer(tokenizer)
    prompts = spec.prompts(**config.env.prompt_options)
    context = make_context(config.env.context, prompts, renderer, config.env.history)
    return Language(tokenizer, renderer, context, spec.parser(**config.env.prompt_options))


def make_model(config: Config, tokenizer: Tokenizer) -> DecoderConfig:
    """The decoder's shape.

    Raises:
      ValueError: the vocabulary is smaller than the tokenizer's.
    """
    m = config.model
    vocab_size = m.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size} tokens"
        )
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=m.hidden_size,
        num_layers=m.num_layers,
        num_heads=m.num_heads,
        num_kv_heads=m.num_kv_heads,
        head_dim=m.head_dim or m.hidden_size // m.num_heads,
        intermediate_size=m.intermediate_size,
        rope_theta=m.rope_theta,
        norm_eps=m.norm_eps,
        tie_embeddings=m.tie_embeddings,
        qkv_bias=m.qkv_bias,
        qk_norm=m.qk_norm,
        dtype=jnp.dtype(m.dtype),
        param_dtype=jnp.dtype(m.param_dtype),
        remat=m.remat,
    )


def make_engine(
    config: Config, model: DecoderConfig, tokenizer: Tokenizer, *, temperature: float | None = None
) -> Engine:
    """A sampling engine without weights, at ``rollout.temperature`` unless another is given."""
    r = config.rollout
    sizes = EngineConfig(
        slots=r.slots or r.tasks_per_update * r.group_size,
        max_tokens=r.max_tokens,
        max_response_tokens=r.max_response_tokens,
        stop_ids=tokenizer.stop_ids,
        burst=r.burst,
        prefill_buckets=tuple(r.prefill_buckets or ()),
    )
    return Engine(model, sizes, seed=config.seed, temperature=r.temperature if temperature is None else temperature)


def make_pool(config: Config) -> EnvPool:
    """The environment workers, started."""
    w = config.workers
    timeouts = PoolTimeouts(start=w.start_timeout, reset=w.reset_timeout, step=w.step_timeout)
    return EnvPool(
        config.env.target,
        config.env.options,
        num_workers=w.num,
        timeouts=timeouts,
        memory_limit_mb=w.memory_limit_mb,
    )


def make_collector(
    config: Config, engine: Engine, pool: EnvPool, language: Language, *, stream: int, first_handle: int = 0
) -> Collector:
    """A collector for training (``stream`` 0) or evaluation (1)."""
    rules = EpisodeRules(config.env.max_turns, config.env.invalid_penalty, config.env.timeout_outcome)
    return Collector(
        engine,
        pool,
        language.make_context,
        language.parser,
        language.tokenizer.decode,
        rules,
        seed=config.seed,
        stream=stream,
        first_handle=first_handle,
        episode_timeout=config.rollout.episode_timeout,
        is_deterministic=config.rollout.deterministic,
    )


def make_algorithm_from(config: Config) -> Algorithm:
    """The algorithm, from plain numbers."""
    a = config.algorithm
    overrides: dict[str, Any] = {
        "loss": a.loss,
        "loss_aggregation": a.aggregation,
        "clip_low": a.clip_low,
        "clip_high": a.clip_high,
        "dual_clip": a.dual_clip,
        "kl_coef": a.kl_coef,
        "kl_kind": a.kl_kind,
        "entropy_coef": a.entropy_coef,
        "scale_by_std": a.scale_by_std,
        "singleton": a.singleton,
        "empg": dict(vars(a.empg)),
        "aem": dict(vars(a.aem)),
    }
    return make_algorithm(
        a.name, modulation=a.modulation, num_minibatches=config.train.num_minibatches, **overrides
    )


def make_batch_shape(config: Config) -> BatchShape:
    """The static sizes of every training batch.

    A transcript needs at most one row per trajectory, a window at most one per turn.
    """
    r = config.rollout
    trajectories = r.tasks_per_update * r.group_size
    rows = trajectories * (config.env.max_turns if config.env.context == "window" else 1)
    return BatchShape(
        trajectories=trajectories,
        turns=config.env.max_turns,
        row_tokens=r.max_tokens,
        micro_rows=micro_rows(config),
        max_rows=rows,
        num_minibatches=config.train.num_minibatches,
    )


def micro_rows(config: Config) -> int:
    """Rows of a micro-batch over all devices."""
    return config.train.micro_tokens // config.rollout.max_tokens
