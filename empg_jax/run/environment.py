"""The environment that a configuration names, and a check that it exists. Starts neither JAX nor workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from empg_envs import EnvSpec, check_options, options_of, resolve_spec
from empg_envs.tags import TagParser
from empg_jax.errors import ConfigError

if TYPE_CHECKING:
    from empg_jax.config import Config


def find_spec(config: Config) -> EnvSpec:
    """Find the environment's spec: its class, prompts, parser and phrases.

    Raises:
      ConfigError: there is no such environment, it does not have an option that is set, or its options have
        no effect within ``env.max_turns``.
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
    if spec.check_turns is not None:
        try:
            spec.check_turns(env.max_turns, **env.options)
        except ValueError as error:
            raise ConfigError(f"env.options of {env.target}: {error}") from None
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


def build_part(config: Config, factory: Callable[..., Any]) -> Any:
    """Build an environment's prompt builder or parser with those of ``env.prompt_options`` that it takes.

    Raises:
      ConfigError: it refuses them.
    """
    options = options_of(factory, config.env.prompt_options)
    try:
        return factory(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"env.prompt_options={options}: {error}") from None


def check_warm_start(config: Config, spec: EnvSpec) -> None:
    """Refuse demonstrations of which the run's own parser would read no action.

    This is told at once for the parser of tags; what other parsers make of the expert's words, the recording
    checks.

    Raises:
      ConfigError: the expert shows bare actions where tags are asked for.
    """
    env, sft = config.env, config.sft
    if not sft.updates or sft.data is not None or env.parser is not None:
        return
    if isinstance(build_part(config, spec.parser), TagParser):
        raise ConfigError(
            f"env.prompt_options.parser=tags: the expert of {env.target} shows bare actions with "
            f"sft.updates={sft.updates}; set sft.updates=0, or the environment's parser of lines (line in "
            "alfworld, plain in household and webshop)"
        )


def reads_bytes(config: Config, spec: EnvSpec) -> bool:
    """Return whether the built-in byte-level tokenizer is used because no other tokenizer is available."""
    return config.model.tokenizer is None and config.model.path is None and spec.phrases is None


def eval_panels(config: Config) -> tuple[str, ...]:
    """Return the panels of ``env.eval_split``, each once."""
    return tuple(dict.fromkeys(config.env.eval_split.split("+")))
