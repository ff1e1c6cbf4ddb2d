"""The weights that a run starts from: the frozen base and the trained parameters."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from empg_jax.errors import ConfigError
from empg_jax.hf.load import load_hf, open_weights
from empg_jax.learner.state import base_model, init_trained
from empg_jax.models.axes import param_shardings
from empg_jax.models.decoder import DecoderConfig, init_params, init_value_head
from empg_jax.models.quantize import quantize_params
from empg_jax.parallel.arrays import put
from empg_jax.run.assembly import (
    make_language,
    make_model,
)
from empg_jax.run.devices import check_devices
from empg_jax.types import Params

if TYPE_CHECKING:
    from empg_jax.config import Config


def check_model(config: Config) -> DecoderConfig:
    """Check the model's folder, shape, weights, tokenizer and devices before a run starts.

    Returns:
      The model's config.

    Raises:
      ConfigError: one of them is wrong, or devices are missing; the message names the problem.
    """
    check_devices(config)
    model = make_model(config, make_language(config).tokenizer)
    check_weights(config, model)
    if model.lora is None:
        return model
    try:
        jax.eval_shape(lambda: init_trained(jax.random.key(0), model))
        base_shapes(config, model)
    except ValueError as error:
        raise ConfigError(f"model.lora, model.quantize={config.model.quantize}: {error}") from None
    return model


def check_weights(config: Config, model: DecoderConfig) -> None:
    """Check the headers of the weights files in ``model.path``, if there is one.

    Raises:
      ConfigError: a file is missing or damaged, or does not fit the model.
    """
    try:
        if config.model.path is not None:
            open_weights(config.model.path, base_model(model))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={config.model.path}: {error}") from None


def make_base(config: Config, model: DecoderConfig, mesh: Mesh) -> Params | None:
    """Load or make the frozen weights below adapters, quantized if configured; None without adapters."""
    if model.lora is None:
        return None
    bare, scheme = base_model(model), config.model.quantize
    shardings = param_shardings(mesh, base_shapes(config, model), model.head_dim)
    if config.model.path is not None:
        return load_hf(config.model.path, bare, shardings=shardings, quantize=scheme)[1]

    def init(key: jax.Array) -> Params:
        return quantize_params(init_params(key, bare), scheme)

    return jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed))


def base_shapes(config: Config, model: DecoderConfig) -> Params:
    """Return the shapes and types of the frozen weights below adapters, after quantization."""

    def init() -> Params:
        return quantize_params(init_params(jax.random.key(0), base_model(model)), config.model.quantize)

    return jax.eval_shape(init)


def make_params(config: Config, model: DecoderConfig, shardings: Params) -> Params:
    """Make the initial trained parameters, in place on the mesh.

    They are read from ``model.path``, else random from ``seed``. Adapters are always fresh.
    """
    if config.model.path is not None and model.lora is None:
        params = load_hf(config.model.path, model, shardings=shardings)[1]
        if model.value_head:
            params["value_head"] = put(init_value_head(model), shardings["value_head"])
        return params
    init = jax.jit(functools.partial(init_trained, model=model), out_shardings=shardings)
    return init(jax.random.key(config.seed))
