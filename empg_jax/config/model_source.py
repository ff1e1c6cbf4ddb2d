"""The configuration for a model without a run: what builds its prompts, and where the model is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from empg_jax.config.load import Config, load_config
from empg_jax.config.places import expand
from empg_jax.errors import ConfigError, nearest

# The packaged configuration whose prompts and lengths suit a language model, by environment.
FOR_LANGUAGE_MODELS = {
    "household": "household_qwen2.5_7b",
    "alfworld": "alfworld_verl",
    "webshop": "webshop_verl",
    "deepsearch": "deepsearch_search_r1",
    "swe": "swe_verified",
}
# An environment of one's own has its own prompts; the packaged options are dropped for it.
FOR_ENTRY_POINTS = "quickstart"
# These configurations are written for many devices; a model on its own is played on one, unless overridden.
ONE_DEVICE = [
    *("mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1", "mesh.sequence=1"),
    *("rollout.data=1", "rollout.tensor=1", "rollout.devices=null"),
]


def load_for_model(
    source: str,
    overrides: Sequence[str],
    *,
    env: str | None,
    config: str | None,
    presets: Sequence[str],
    say: Callable[[str], None],
    hint: str = "KEY=VALUE changes them",
) -> Config:
    """Load the configuration under which a model is played.

    Args:
      source: a Hugging Face folder or hub id, the name of a preset, whose weights are random, or the address
        of a server.
      overrides: dotted overrides; later than everything else.
      env: name or entry point of an environment. It chooses the packaged configuration for its prompts where
        ``config`` is None, else it must be that configuration's own.
      config: a packaged name or a YAML file.
      presets: the names of presets.
      say: receives messages for the user.
      hint: how the command changes prompts and lengths that it did not name.

    Raises:
      ConfigError: there is no such model, environment or configuration, or the two do not go together.
    """
    chosen, changes = config, list[str]()
    if chosen is None:
        assert env is not None, "one of the two says how prompts are built"
        chosen, changes = _choose(env)
    resolved = load_config(chosen, [*changes, *_locate(source, presets), *overrides])
    if env is not None and resolved.env.target != env:
        raise ConfigError(f"--env {env}: {chosen} is for {resolved.env.target}; leave out one of the two")
    if config is None:
        say(f"prompts and lengths are those of {chosen} ({hint})")
    return resolved


def _choose(env: str) -> tuple[str, list[str]]:
    """Return the packaged configuration for an environment, and overrides."""
    if ":" in env:
        return FOR_ENTRY_POINTS, ["env.name=null", f"env.entry_point={env}"]
    if env not in FOR_LANGUAGE_MODELS:
        known = ", ".join(FOR_LANGUAGE_MODELS)
        raise ConfigError(
            f"--env {env}: unknown{nearest(env, FOR_LANGUAGE_MODELS)}; choose {known}, "
            "or an entry point package.module:attribute"
        )
    return FOR_LANGUAGE_MODELS[env], ONE_DEVICE


def is_address(source: str) -> bool:
    """Return whether a policy is behind a server, by the look of its name."""
    return source.startswith(("http://", "https://"))


def _locate(source: str, presets: Sequence[str]) -> list[str]:
    """Return the overrides that name the model."""
    if is_address(source):
        return ["model.path=null", "model.preset=null"]
    folder = expand(source)
    if folder.is_dir():
        if (folder / "config.yaml").is_file():
            raise ConfigError(
                f"{source} is a run, which has its configuration: leave out --env and --config, and override "
                "the keys that differ"
            )
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{source} is no model: there is no config.json in it")
        return [f"model.path={json.dumps(str(folder.absolute()))}", "model.preset=null"]
    if source in presets:
        return ["model.path=null", f"model.preset={source}"]
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return [f"model.path={source}", "model.preset=null"]  # a hub id
    raise ConfigError(
        f"{source} is neither a folder, nor a hub id like owner/name, nor a preset"
        f"{nearest(source, presets)}; the presets are {', '.join(presets)}"
    )
