"""The environment that a configuration names, and a check that it exists. Starts neither JAX nor workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from empg_envs import EnvSpec, check_options, resolve_spec
from empg_jax.errors import ConfigError

if TYPE_CHECKING:
    from empg_jax.config import Config


def find_spec(config: Config) -> EnvSpec:
    """Find the environment's spec: its class, prompts, parser and phrases.

    Raises:
      ConfigError: there is no such environment, or it does not have an option that is set.
    """
    env = config.env
    try:
        spec = resolve_spec(env.target)
    except (TypeError, ValueError) as error:
        key = "env.entry_point" if env.entry_point else "env.name"
        raise ConfigError(f"{key}={env.target}: {error}") from None
    for key, options in (("options", (env.options, {})), ("prompt_options", ({}, env.prompt_options))):
        try:
            check_options(spec, *options)
        except TypeError as error:
            raise ConfigError(f"env.{key}: {error}") from None
    return spec


def try_options(config: Config, spec: EnvSpec) -> None:
    """Build one environment where that is quick, so that options which it refuses are told before the run.

    Raises:
      ConfigError: it refuses them, or its package is not installed.
    """
    if not spec.is_tried or config.workers.backend != "local":  # other machines may have other packages
        return
    try:
        spec.make(**config.env.options).close()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"env.options of {config.env.target}: {error}") from None


def reads_bytes(config: Config, spec: EnvSpec) -> bool:
    """Return whether the built-in byte-level tokenizer is used because no other tokenizer is available."""
    return config.model.tokenizer is None and config.model.path is None and spec.phrases is None
