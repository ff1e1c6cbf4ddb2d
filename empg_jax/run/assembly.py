"""Construction of a run's parts from its configuration: one small function per part, without state."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import optax

from empg_envs import EnvSpec, parsers
from empg_envs.base import ActionParser, PromptBuilder
from empg_jax.algorithms import (
    ALGORITHMS,
    Algorithm,
    Recipe,
    build,
    describe_recipe,
    load_recipe,
    make_recipe,
)
from empg_jax.algorithms.aggregation import SCALED_MODES
from empg_jax.algorithms.configure import configure, spec_of
from empg_jax.algorithms.keys import NOT_OF_PARTS, readable
from empg_jax.algorithms.part import name_of
from empg_jax.algorithms.recipes import for_single_attempts
from empg_jax.algorithms.trial import try_recipe
from empg_jax.errors import ConfigError
from empg_jax.hf.config import config_from_hf, read_hf_config
from empg_jax.hf.hub import find_folder
from empg_jax.hf.presets import make_preset
from empg_jax.learner.batching import BatchShape
from empg_jax.learner.state import make_optimizer
from empg_jax.models.decoder import DecoderConfig
from empg_jax.models.lora import LoraConfig
from empg_jax.rollout.context import CallContext, ContextFactory, make_context
from empg_jax.rollout.own_code import CheckedParser
from empg_jax.run.environment import build_part, find_spec, reads_bytes
from empg_jax.text.builtin import BYTES, build_byte_tokenizer, build_phrase_tokenizer
from empg_jax.text.chat import ChatRenderer
from empg_jax.text.history import UnstableHistory
from empg_jax.text.template import ChatTemplateError, read_source, stop_clock
from empg_jax.text.tokenizer import Tokenizer, load_tokenizer, read_chat_template
from empg_jax.text.vocabulary import check_vocabulary

if TYPE_CHECKING:
    from empg_jax.config import Config
    from empg_jax.config.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class Language:
    """The conversion between text and tokens in a run: tokenizer, chat format, prompts and action parser."""

    tokenizer: Tokenizer
    renderer: ChatRenderer
    make_context: ContextFactory
    parser: ActionParser


def make_language(config: Config, saved: Path | None = None, *, keeps_template: bool = True) -> Language:
    """Build tokenizer, renderer, context and parser.

    Args:
      config: the configuration.
      saved: a run's saved tokenizer, used in place of the one that the configuration names.
      keeps_template: whether a saved tokenizer keeps its chat template, whatever `model.chat_template` is.

    Raises:
      ConfigError: there is no such environment, it refuses its options, or the tokenizer or its chat template
        cannot be used.
    """
    spec = find_spec(config)
    tokenizer = make_tokenizer(config, saved, spec, keeps_template=keeps_template)
    options = chat_variables(config)
    try:
        renderer = ChatRenderer(tokenizer, options=options, history=config.env.history_mode)
    except UnstableHistory as error:
        raise ConfigError(
            f"env.history_mode=append: {error}; what follows an answer must not depend on what stands before "
            "it: use env.history_mode=template, or model.chat_template=FILE"
        ) from None
    except ChatTemplateError as error:
        raise ConfigError(f"{error}; model.chat_template=FILE brings a template of your own") from None
    prompts, parser = make_prompts(config, spec)
    if renderer.opens_thought:
        # A program's own conversation goes on from the answer as it was sampled.
        parser = parsers.OpenThought(parser, keeps_ended=spec.has_calls)
    context: ContextFactory
    if spec.has_calls:
        if config.env.context != "transcript":
            raise ConfigError(
                f"env.context={config.env.context}: the prompts of {config.env.target} are its program's "
                "own; leave env.context at transcript"
            )
        context = functools.partial(CallContext, renderer)
    else:
        context = make_context(config.env.context, prompts, renderer, config.env.history)
    return Language(tokenizer, renderer, context, parser)


def make_prompts(config: Config, spec: EnvSpec) -> tuple[PromptBuilder, ActionParser]:
    """Build the environment's prompts and the parser of the answers.

    Raises:
      ConfigError: it refuses its options.
    """
    prompts = build_part(config, spec.prompts)
    if (name := config.env.parser) is None:
        return prompts, CheckedParser(build_part(config, spec.parser))
    if spec.has_calls:
        raise ConfigError(f"env.parser={name}: an answer to {config.env.target} is the whole response")
    return parsers.ask_for(name, prompts), CheckedParser(parsers.make_parser(name))


def chat_variables(config: Config) -> dict[str, Any]:
    """Return the variables of the chat template: those of the configuration, and the clock of the run."""
    model = config.model
    day = {} if model.chat_date is None else {"strftime_now": stop_clock(model.chat_date)}
    return {**model.chat_options, **day}


def asks_for_date(config: Config) -> bool:
    """Return whether the chat template prints today's date, and the configuration does not set it."""
    m = config.model
    if m.chat_date is not None:
        return False
    folder = m.tokenizer or m.path
    if m.chat_template is not None:
        source: str | None = read_source(m.chat_template)
    else:
        source = None if folder in (None, BYTES) else read_chat_template(folder)
    return source is not None and "strftime_now" in source


def make_tokenizer(
    config: Config, saved: Path | None, spec: EnvSpec, *, keeps_template: bool = True
) -> Tokenizer:
    """Choose the first of: saved tokenizer, configured one, one built for the environment, bytes.

    See `make_language` for the arguments.

    Raises:
      ConfigError: it cannot be loaded or built.
    """
    m = config.model
    try:
        if saved is not None and keeps_template:  # the file of its template may be gone
            return load_tokenizer(saved)
        template = None if m.chat_template is None else read_source(m.chat_template)
        if saved is not None:
            return load_tokenizer(saved, chat_template=template)
        if m.tokenizer == BYTES or reads_bytes(config, spec):
            return build_byte_tokenizer(template)
        if (path := m.tokenizer or m.path) is not None:
            tokenizer = load_tokenizer(path, chat_template=template)
            if m.path is not None:
                check_vocabulary(tokenizer, find_folder(m.path, ["config.json", "tokenizer.json"], "model"))
            return tokenizer
    except (OSError, ValueError) as error:
        raise ConfigError(f"the tokenizer cannot be loaded: {error}") from None
    if template is not None:
        raise ConfigError(
            "model.chat_template needs a tokenizer of your own (model.tokenizer or model.path): the one that "
            f"is built for {config.env.target} brings its template"
        )
    # An environment without phrases reads bytes, and that case returned above.
    assert spec.phrases is not None
    try:
        return build_phrase_tokenizer(spec.phrases(**config.env.options))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"env.options={config.env.options}: {error}; model.tokenizer={BYTES} reads any text, byte by byte"
        ) from None


def make_model(config: Config, tokenizer: Tokenizer) -> DecoderConfig:
    """Build the decoder's config; see `shape_model`."""
    return shape_model(config, config.model, tokenizer.vocab_size)


def shape_model(config: Config, section: ModelConfig, vocab_size: int) -> DecoderConfig:
    """Build the decoder's config from a folder's config.json, a preset, or the configuration's sizes.

    Args:
      config: the configuration.
      section: the description of the model, usually ``config.model``.
      vocab_size: size of the tokenizer's vocabulary; also the model's, where nothing else sets it.

    Raises:
      ConfigError: an unknown preset, a folder with a model that the decoder does not support, a vocabulary
        smaller than the tokenizer's.
    """
    m = section
    numerics: dict[str, Any] = {
        "dtype": jnp.dtype(m.dtype),
        "param_dtype": jnp.dtype(m.param_dtype),
        "reduce_dtype": jnp.dtype(m.reduce_dtype),
        "remat": m.remat,
        "scan_layers": m.scan_layers,
        "attention": m.attention,
        "lora": LoraConfig(m.lora.rank, m.lora.alpha, tuple(m.lora.targets)) if m.lora.rank else None,
        "value_head": make_recipe_from(config).critic is not None,
    }
    if m.path is not None:
        try:
            keys = read_hf_config(find_folder(m.path, ["config.json"], "model"))
            found = config_from_hf(keys, max_length=config.rollout.max_tokens)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.path={m.path}: {error}") from None
        model = dataclasses.replace(found, **numerics)
    elif m.preset is not None:
        try:
            model = make_preset(m.preset, **numerics)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    else:
        model = DecoderConfig(
            vocab_size=m.vocab_size or vocab_size,
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
            **numerics,
        )
    if model.vocab_size < vocab_size:
        raise ConfigError(
            f"the model has {model.vocab_size} embedding rows, the tokenizer {vocab_size} tokens: "
            "raise model.vocab_size or name the model's own tokenizer (model.tokenizer)"
        )
    return model


def make_recipe_from(config: Config, *, group_size: int | None = None) -> Recipe:
    """Compose the recipe that a configuration describes, with the penalty for invalid actions.

    Args:
      config: the configuration.
      group_size: attempts of each task; with 1, AEM's scope ``group`` becomes ``batch``, and warns.

    Raises:
      ConfigError: parts that do not go together, or an entry point that cannot be used.
    """
    a = config.algorithm
    try:
        base: str | Recipe = a.name if a.entry_point is None else load_recipe(a.entry_point)
        start = base if isinstance(base, Recipe) else ALGORITHMS[base]
        keys = {key: value for key, value in flat(a).items() if key not in NOT_OF_PARTS}
        if config.env.invalid_penalty:  # without it, a custom recipe keeps its own penalty
            keys["invalid_penalty"] = config.env.invalid_penalty
        values = readable(spec_of(start), keys)
        recipe = make_recipe(base, values, group_size=group_size)
        if name_of(recipe.aggregate) in SCALED_MODES and a.loss_scale is None:
            # Rows are longer where episodes share beginnings, of which the loss must know nothing.
            recipe = configure(recipe, {"loss_scale": config.rollout.max_tokens})
        return recipe
    except ValueError as error:
        where = "algorithm" if a.entry_point is None else "algorithm.entry_point"
        raise ConfigError(f"{where}: {error}") from None


def flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """List the keys of a section and of those inside it, dotted, with or without pydantic."""
    found: dict[str, Any] = {}
    for key, value in vars(section).items():
        found |= flat(value, f"{prefix}{key}.") if hasattr(value, "__dict__") else {prefix + key: value}
    return found


def make_algorithm_from(config: Config) -> Algorithm:
    """Build the recipe's functions; a custom recipe is tried once on a small batch.

    Raises:
      ConfigError: as `make_recipe_from`; or a custom function fails or returns a wrong shape or NaN. The
        message names the function.
    """
    recipe = make_recipe_from(config, group_size=config.rollout.group_size)
    if config.algorithm.entry_point is not None:
        try:
            try_recipe(recipe, f"algorithm.entry_point={config.algorithm.entry_point}")
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return build(recipe, num_minibatches=config.train.num_minibatches)


def describe_algorithm(config: Config) -> str:
    """Name the algorithm in one line, for example ``GRPO + EMPG (k=1, k'=1, zeta=0.05, batch)``."""
    name = config.algorithm.name or config.algorithm.entry_point
    recipe = make_recipe_from(config)
    recipe = for_single_attempts(recipe) if config.rollout.group_size == 1 else recipe
    return describe_recipe(recipe, name, ALGORITHMS.get(name))


def needs_reference(config: Config) -> bool:
    """Return whether the frozen reference policy is scored beside the policy."""
    return make_recipe_from(config).needs_reference


def needs_answers(config: Config) -> bool:
    """Return whether the known answer of each task is scored after every prompt."""
    return make_recipe_from(config).needs_answers


def make_batch_shape(config: Config) -> BatchShape:
    """Compute the static sizes of every training batch.

    A transcript needs at most one row per trajectory, a window at most one per turn. Each mini-batch has room
    for the largest share of trajectories, so that no split of the trajectories needs a larger batch.
    """
    r, num_minibatches = config.rollout, config.train.num_minibatches
    trajectories = r.tasks_per_update * r.group_size
    share = -(-trajectories // num_minibatches)
    share *= config.env.max_turns if config.env.context == "window" else 1
    rows, joined = micro_rows(config), 1
    if config.train.share_prefix:
        # One long row per device: the more conversations are in a row, the more share one beginning.
        rows = config.mesh.data * config.mesh.fsdp
        joined = micro_rows(config) // rows
        # A new row is begun only where no other has room for a whole conversation, so each but the last
        # holds the tokens of ``joined - 1`` conversations of full length.
        share = -(-share // max(joined - 1, 1))
    return BatchShape(
        trajectories=trajectories,
        turns=config.env.max_turns,
        row_tokens=joined * r.max_tokens,
        micro_rows=rows,
        max_rows=share * num_minibatches,
        num_minibatches=num_minibatches,
        shares_prefix=config.train.share_prefix,
    )


def micro_rows(config: Config) -> int:
    """Compute the rows of ``rollout.max_tokens`` in a micro-batch over all devices."""
    return config.train.micro_tokens // config.rollout.max_tokens


def make_sft_optimizer(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Build the optimizer of the warm start; its schedule counts updates."""
    s, t = config.sft, config.train
    return make_optimizer(
        learning_rate=s.learning_rate,
        final_learning_rate=s.learning_rate / 100 if s.final_learning_rate is None else s.final_learning_rate,
        total_steps=s.updates,
        schedule="cosine",
        beta1=t.beta1,
        beta2=t.beta2,
        moments=t.moments,
        weight_decay=t.weight_decay,
        grad_clip=t.grad_clip,
    )


def make_rl_optimizer(
    config: Config, updates: int | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Build the optimizer of the RL phase; its schedule counts the steps of ``updates`` (None: the run's)."""
    t = config.train
    steps = t.num_minibatches * t.epochs
    critic = getattr(make_recipe_from(config).critic, "options", {})
    return make_optimizer(
        learning_rate=t.learning_rate,
        final_learning_rate=t.learning_rate / 20 if t.final_learning_rate is None else t.final_learning_rate,
        total_steps=(t.updates if updates is None else updates) * steps,
        schedule=t.schedule,
        warmup_steps=t.warmup_updates * steps,
        beta1=t.beta1,
        beta2=t.beta2,
        moments=t.moments,
        weight_decay=t.weight_decay,
        grad_clip=t.grad_clip,
        critic_learning_rate=critic.get("learning_rate"),
        critic_grad_clip=critic.get("grad_clip"),
        critic_warmup_steps=critic.get("warmup_updates", 0) * steps,
    )
