"""The environment that a configuration names, and a check that it exists. Starts neither JAX nor workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from empg_envs import EnvSpec, check_options, resolve_spec
from empg_envs.tags import TagParser
from empg_envs.template import read_template
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
    try:
        parser = spec.parser(**env.prompt_options)
    except ValueError as error:
        raise ConfigError(f"env.prompt_options: {error}") from None
    if isinstance(parser, TagParser):
        raise ConfigError(
            f"env.prompt_options.parser=tags: the expert of {env.target} shows bare actions with "
            f"sft.updates={sft.updates}; set sft.updates=0, or the environment's parser of lines (line in "
            "alfworld, plain in household and webshop)"
        )


def keep_texts(config: Config) -> Config:
    """Put the content of files that prompt options name, such as a template, in the place of the names.

    A run is made of the content: its folder keeps it, and a resume does not depend on the files.

    Raises:
      ConfigError: a file cannot be read, or the prompt builder refuses it.
    """
    spec, options = find_spec(config), dict(config.env.prompt_options)
    names = [name for name in spec.texts if options.get(name) is not None]
    if not names:
        return config
    try:
        spec.prompts(**options)  # refused here, by the file's name and before a run is made
        options |= {name: read_template(options[name]) for name in names}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"env.prompt_options: {error}") from None
    return config.model_copy(update={"env": config.env.model_copy(update={"prompt_options": options})})


def keep_date(config: Config, today: str) -> Config:
    """Write a run's date into its configuration: a resumed run tells its policy the same date."""
    if not hasattr(config, "model_copy"):  # a resolved file, read without pydantic
        vars(config.model)["chat_date"] = today
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"chat_date": today})})


def reads_bytes(config: Config, spec: EnvSpec) -> bool:
    """Return whether the built-in byte-level tokenizer is used because no other tokenizer is available."""
    return config.model.tokenizer is None and config.model.path is None and spec.phrases is None


def eval_panels(config: Config) -> tuple[str, ...]:
    """Return the panels of ``env.eval_split``, each once."""
    return tuple(dict.fromkeys(config.env.eval_split.split("+")))
