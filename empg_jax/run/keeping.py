"""What a run writes into its configuration, so that it may go on on another day and from another folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_envs.template import read_template
from empg_jax.config.places import expand
from empg_jax.errors import ConfigError
from empg_jax.parallel.hosts import Hosts
from empg_jax.run.environment import build_part, find_spec
from empg_jax.run.step_folders import is_object_store
from empg_jax.text.builtin import BYTES

if TYPE_CHECKING:
    from empg_jax.config import Config

# Files and folders that a run reads. Where there is none of the name, it may be a hub's, or a packaged one.
READ = (
    *("model.path", "model.tokenizer", "model.chat_template"),
    *("rollout.stored", "rollout.schedule", "sft.data"),
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
    build_part(config, spec.prompts)  # refused here, by the file's name and before a run is made
    try:
        options |= {name: read_template(options[name]) for name in names}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"env.prompt_options: {error}") from None
    return _with(config, "env", prompt_options=options)


def keep_date(config: Config, today: str) -> Config:
    """Write a run's date into its configuration: a resumed run tells its policy the same date."""
    return _with(config, "model", chat_date=today)


def keep_places(config: Config, hosts: Hosts) -> Config:
    """Write the absolute paths of what the run reads, and of a chosen folder of checkpoints."""
    for key in READ:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if isinstance(value, str):
            config = _with(config, section, **{name: _absolute(value, key)})
        elif isinstance(value, Sequence):
            config = _with(config, section, **{name: tuple(_absolute(each, key) for each in value)})
    options = dict(config.env.options)
    for name in set(find_spec(config).places) & options.keys():
        options[name] = _all_absolute(options[name], f"env.options.{name}")
    return keep_checkpoints(_with(config, "env", options=options), hosts)


def keep_checkpoints(config: Config, hosts: Hosts) -> Config:
    """Write the absolute path of a chosen folder of checkpoints."""
    directory = config.checkpoint.dir
    if directory is None or is_object_store(directory) or expand(directory, "checkpoint.dir").is_absolute():
        return config
    place = hosts.first("checkpoint-dir", lambda: str(Path(directory).absolute()))  # all hosts share it
    return _with(config, "checkpoint", dir=place)


def _absolute(place: str, key: str) -> str:
    path = expand(place, key)
    if key == "model.tokenizer" and place == BYTES:
        return place
    return str(path.absolute()) if path.exists() and not path.is_absolute() else place


def _all_absolute(value: Any, key: str) -> Any:
    """Return an option with all places in it made absolute, as deep as they lie."""
    if isinstance(value, str):
        return _absolute(value, key)
    if isinstance(value, Mapping):
        return {name: _all_absolute(each, f"{key}.{name}") for name, each in value.items()}
    return [_all_absolute(each, key) for each in value] if isinstance(value, list | tuple) else value


def _with(config: Config, section: str, **values: Any) -> Config:
    """Return the configuration with other values in a section."""
    if not hasattr(config, "model_copy"):  # a resolved file, read without pydantic
        vars(getattr(config, section)).update(values)
        return config
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
