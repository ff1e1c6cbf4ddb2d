"""A policy for evaluation, rollouts or export: of a run on disk, or what a configuration starts from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from empg_jax.errors import ConfigError
from empg_jax.learner.fingerprint import TEXT, checksum, text_logprob
from empg_jax.learner.state import state_shardings
from empg_jax.models.decoder import DecoderConfig
from empg_jax.parallel.mesh import make_mesh
from empg_jax.run.assembly import (
    Language,
    make_language,
    make_model,
    make_rl_optimizer,
)
from empg_jax.run.checkpoint import Checkpoints, RefusedCheckpoint, check_base
from empg_jax.run.devices import check_devices, learner_devices
from empg_jax.run.folder import checkpoint_dir, split_checkpoint
from empg_jax.run.lock import is_locked
from empg_jax.run.restoring import load_state
from empg_jax.run.weights import check_model, make_base, make_params
from empg_jax.types import Params

if TYPE_CHECKING:
    from empg_jax.config import Config


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """One checkpoint of a run, or the policy that a configuration starts from (step 0).

    Attributes:
      config: the run's configuration.
      language: the run's tokenizer, chat format, prompts and parser.
      model: decoder config.
      mesh: the mesh that holds the parameters.
      step: the checkpoint's number.
      params: the trained parameters.
      base: the frozen parameters below adapters; None without adapters.
    """

    config: Config
    language: Language
    model: DecoderConfig
    mesh: Mesh
    step: int
    params: Params
    base: Params | None

    def text_logprob(self) -> float:
        """Compute the policy's fingerprint: the log-probability of a fixed text, in nats per token."""
        ids = self.language.tokenizer.encode(TEXT)
        return round(text_logprob(self.params, self.model, ids, self.mesh, self.base), 4)


def open_saved(
    path: Path, overrides: Sequence[str], warn: Callable[[str], None], *, samples: bool = False
) -> SavedRun:
    """Load the newest usable checkpoint of a run, or a given one, into this process.

    Where the run's mesh has more devices than are here, as in a run of several hosts, the state is split over
    those that are here. It must fit them whole, moments included; else use the host's memory
    (``JAX_PLATFORMS=cpu``).

    Args:
      path: run folder, or a step's folder inside its ``checkpoints``.
      overrides: dotted overrides of the run's configuration.
      warn: receives messages for the user.
      samples: whether the weights go to the server of ``rollout.url``, where the run has one.

    Raises:
      ConfigError: there is no run at the path.
      CheckpointError: there is no usable checkpoint at the path, or its adapters belong to another
        base.
      ConfigError: an override does not fit, asks for devices that are missing, or names another tokenizer.
      ConfigError: the run is being trained through the server that these weights would go to.
    """
    run_dir, step = split_checkpoint(Path(path))
    if not (run_dir / "config.yaml").exists():
        raise RefusedCheckpoint(
            f"{path} is neither a run folder (no config.yaml in it) nor RUN/checkpoints/STEP"
        )
    config, saved = _read(run_dir / "config.yaml", overrides, warn)
    own: dict[str, Any] = saved.get("model") or {}
    if samples:
        _check_server(config, (saved.get("rollout") or {}).get("url"), run_dir)
    if config.model.tokenizer != own.get("tokenizer"):
        raise ConfigError(
            f"model.tokenizer={config.model.tokenizer}: {path} keeps the tokenizer that it was trained with; "
            "model.chat_template=FILE gives it another chat template"
        )
    if not any(change.startswith("mesh.") for change in overrides):
        config = _fit_mesh(config, warn)
    check_devices(config)
    keeps_template = config.model.chat_template == own.get("chat_template")
    language = make_language(config, run_dir / "tokenizer", keeps_template=keeps_template)
    model = make_model(config, language.tokenizer)
    mesh = make_mesh(**vars(config.mesh))
    directory = checkpoint_dir(config, run_dir)
    checkpoints = Checkpoints(directory, keep=config.checkpoint.keep, warn=warn)
    if step is not None:
        checkpoints.check_step(step)
    restored = load_state(config, checkpoints, model, mesh, step)
    base = make_base(config, model, mesh)
    check_base(restored.progress.get("base"), None if base is None else checksum(base))
    return SavedRun(config, language, model, mesh, restored.step, restored.state.params, base)


def _read(path: Path, overrides: Sequence[str], warn: Callable[[str], None]) -> tuple[Config, dict[str, Any]]:
    """Read a run's configuration, with overrides and as it is on disk.

    A recipe of the user's own that cannot be loaded any more is not needed here, and left out.
    """
    # Imported here, because it loads pydantic, which only this function needs.
    from empg_jax.config import load_config
    from empg_jax.config.yaml import read_yaml

    saved = read_yaml(path)
    recipe = (saved.get("algorithm") or {}).get("entry_point")
    try:
        return load_config(str(path), overrides), saved
    except ConfigError as error:
        if recipe is None or recipe not in str(error):
            raise
        kept = [change for change in overrides if not change.startswith("algorithm.")]
        config = load_config(str(path), kept, algorithm="reinforce")  # it demands least of the others
        reason = " ".join(str(error).split("\n", 1)[-1].split())
        warn(f"the run's recipe is left out, as it is not needed here: {reason}")
        return config, saved


def _check_server(config: Config, own: str | None, run_dir: Path) -> None:
    """Refuse to replace the weights on the run's own server while it trains on what they sample."""
    url = config.rollout.url
    if url is not None and url == own and is_locked(run_dir):
        raise ConfigError(
            f"{run_dir} is being trained through {url}, whose weights this would replace: sample here with "
            "rollout.engine=builtin rollout.url=null, or wait until the run ends"
        )


def _fit_mesh(config: Config, warn: Callable[[str], None]) -> Config:
    """Split over the devices that are here, if the mesh has more of them."""
    devices = len(learner_devices(config))
    needed = math.prod(vars(config.mesh).values())
    if needed <= devices or not devices:  # without any, what is refused is rollout.devices
        return config
    warn(f"the run's mesh has {needed} devices, and here are {devices}: mesh.fsdp={devices}")
    mesh = type(config.mesh)(fsdp=devices)
    return config.model_copy(update={"mesh": mesh})


def open_new(config: Config) -> SavedRun:
    """Load or make the weights that a configuration starts from.

    Raises:
      ConfigError: the model, its tokenizer or the environment cannot be used, or devices are missing.
    """
    model = check_model(config)
    language = make_language(config)
    mesh = make_mesh(**vars(config.mesh), devices=learner_devices(config))
    optimizer, _ = make_rl_optimizer(config)
    params = make_params(config, model, state_shardings(mesh, model, optimizer).params)
    return SavedRun(config, language, model, mesh, 0, params, make_base(config, model, mesh))
