"""The policy that is served: a run's, a Hugging Face folder's, or a preset with random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from empg_jax.config.places import expand
from empg_jax.engine.engine import Engine
from empg_jax.errors import ConfigError, nearest
from empg_jax.hf.config import read_positions
from empg_jax.hf.presets import PRESETS
from empg_jax.learner.state import state_shardings
from empg_jax.models.decoder import DecoderConfig
from empg_jax.parallel.mesh import make_mesh
from empg_jax.run.announcing import announce_length
from empg_jax.run.assembly import (
    chat_variables,
    make_model,
    make_rl_optimizer,
    make_tokenizer,
)
from empg_jax.run.devices import check_devices, learner_devices
from empg_jax.run.environment import find_spec
from empg_jax.run.process import prepare_jax
from empg_jax.run.sampling import make_engine
from empg_jax.run.saved import open_saved
from empg_jax.run.weights import check_weights, make_base, make_params
from empg_jax.text.builtin import BYTES
from empg_jax.text.chat import ChatRenderer
from empg_jax.text.template import ChatTemplateError
from empg_jax.text.tokenizer import Tokenizer
from empg_jax.types import Params

if TYPE_CHECKING:
    from empg_jax.config import Config

MAX_TOKENS = 4096  # of a conversation, where neither serve.max_tokens nor a run says it, nor the model fewer


@dataclasses.dataclass(frozen=True)
class Start:
    """What training on the server starts from.

    Attributes:
      model: decoder config.
      mesh: the learner's devices.
      params: the trained parameters, on the host.
      base: the frozen parameters below adapters, on the mesh; None without adapters.
    """

    model: DecoderConfig
    mesh: Mesh
    params: Params
    base: Params | None


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy that is ready to answer.

    Attributes:
      name: the model's name on the wire.
      config: its configuration.
      tokenizer: its tokenizer.
      renderer: its chat template; None where it has none that ends a turn.
      engine: the sampler, with weights.
      start: the same weights for the learner; None where nothing is trained.
    """

    name: str
    config: Config
    tokenizer: Tokenizer
    renderer: ChatRenderer | None
    engine: Engine
    start: Start | None = None


def open_policy(
    source: str, overrides: Sequence[str], say: Callable[[str], None], *, is_trained: bool = False
) -> Policy:
    """Load a policy and its engine.

    Args:
      source: folder of a run or of a checkpoint in one, a Hugging Face folder or hub id, a preset's name, or
        a configuration; the last two start untrained.
      overrides: dotted overrides of its configuration.
      say: receives messages for the user.
      is_trained: whether the server trains it, too.

    Raises:
      ConfigError: there is no such policy, or an override does not fit.
      CheckpointError: a run has no usable checkpoint.
    """
    path = expand(source)
    is_step = path.name.isdigit() and path.parent.name == "checkpoints"
    if is_step or (path / "config.yaml").is_file():
        saved = open_saved(path, overrides, warn=say)
        home = path.absolute().parents[1] if is_step else path.absolute()
        tokenizer, renderer = saved.language.tokenizer, saved.language.renderer
        engine = _make_engine(saved.config, tokenizer)
        _load(engine, saved.params, saved.base, saved.step)
        start = Start(saved.model, saved.mesh, saved.params, saved.base)
        policy = Policy(home.name, saved.config, tokenizer, renderer, engine, start)
    else:
        policy = _open_new(source, path, overrides)
    assert policy.start is not None
    first = None
    if is_trained:  # the learner makes copies of its own, so the first weights wait on the host
        first = dataclasses.replace(policy.start, params=jax.device_get(policy.start.params))
    policy = dataclasses.replace(policy, start=first)
    key = "rollout.max_tokens" if policy.config.serve.max_tokens is None else "serve.max_tokens"
    announce_length(policy.config, policy.engine.config.max_tokens, say=say, key=key)
    name = policy.config.serve.name
    return policy if name is None else dataclasses.replace(policy, name=name)


def _open_new(source: str, path: Path, overrides: Sequence[str]) -> Policy:
    """Load a Hugging Face folder, or make random weights of a preset or of a configuration."""
    from empg_jax.config import load_config  # loads pydantic
    from empg_jax.config.yaml import find_packaged

    name, packaged = path.absolute().name, find_packaged()
    if source in PRESETS:
        config = _configure(source, {"preset": source, "tokenizer": BYTES}, overrides)
    elif source in packaged or path.suffix in (".yaml", ".yml"):
        config = load_config(source, overrides)
        name = config.name
    elif path.is_dir() or source.count("/") == 1:
        config = _configure(source, {"path": source}, overrides)
    else:
        hint = nearest(source, [*PRESETS, *packaged])
        raise ConfigError(
            f"{source} is no run, no Hugging Face folder, no preset and no configuration{hint}; presets are "
            f"{', '.join(PRESETS)}"
        )
    prepare_jax(config)
    check_devices(config)
    tokenizer = make_tokenizer(config, None, find_spec(config))
    try:
        renderer = ChatRenderer(tokenizer, options=chat_variables(config))
    except ChatTemplateError:
        renderer = None  # a base model: completions work without a template
    model_config = make_model(config, tokenizer)
    check_weights(config, model_config)
    mesh = make_mesh(**vars(config.mesh), devices=learner_devices(config))
    shardings = state_shardings(mesh, model_config, make_rl_optimizer(config)[0]).params
    engine = _make_engine(config, tokenizer)
    params, base = make_params(config, model_config, shardings), make_base(config, model_config, mesh)
    _load(engine, params, base, 0)
    return Policy(name, config, tokenizer, renderer, engine, Start(model_config, mesh, params, base))


def _configure(source: str, model: dict[str, Any], overrides: Sequence[str]) -> Config:
    """Make a configuration whose rows hold the longest conversation."""
    from empg_jax.config import make_config  # loads pydantic

    asked = [item.partition("=")[2] for item in overrides if item.startswith("serve.max_tokens=")]
    longest = int(asked[-1]) if asked and asked[-1].isdigit() else _default_length(model)
    values: dict[str, Any] = {
        "model": model,
        "rollout": {"max_tokens": longest, "max_response_tokens": max(1, longest - 1)},
        "train": {"micro_tokens": longest},
    }
    return make_config(values, overrides, source)


def _default_length(model: dict[str, Any]) -> int:
    """Return the longest conversation that is served where the command does not say it."""
    try:
        positions = read_positions(model["path"]) if "path" in model else None
    except (OSError, ValueError):
        positions = None  # loading the model reports that error
    return min(MAX_TOKENS, max(2, positions or MAX_TOKENS))


def _make_engine(config: Config, tokenizer: Tokenizer) -> Engine:
    """Build an engine whose slots and lengths are those of ``serve``."""
    prepare_jax(config)
    longest = config.serve.max_tokens or config.rollout.max_tokens
    buckets = tuple(size for size in config.rollout.prefill_buckets or () if size <= longest)
    sizes = {
        "slots": config.serve.slots,
        "max_tokens": longest,
        "max_response_tokens": longest - 1,
        "prefill_buckets": buckets or None,
    }
    rollout = config.rollout.model_copy(update=sizes)
    config = config.model_copy(update={"rollout": rollout})
    return make_engine(config, make_model(config, tokenizer), tokenizer.stop_ids, is_served=True)


def _load(engine: Engine, params: Params, base: Params | None, version: int) -> None:
    if base is not None:
        engine.base = engine.place(base)
    engine.load(params, version)
