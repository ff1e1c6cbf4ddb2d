"""Folders of published weights: safetensors that a server on the same file system loads."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import tempfile
from pathlib import Path

from empg_jax.hf.config import config_to_hf
from empg_jax.hf.save import save_hf
from empg_jax.models.decoder import DecoderConfig
from empg_jax.models.lora import merge
from empg_jax.rollout.server.answers import SamplerError
from empg_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Placed:
    """Weights on disk; later ones have higher numbers."""

    number: int
    path: Path


class Folders:
    """A temporary folder with one folder per set of weights. It is deleted when this object is closed.

    Args:
      model: the decoder's config.
      home: folder that the server sees, too; None takes the machine's folder of temporary files.

    Raises:
      SamplerError: the folder cannot be written, or no Hugging Face family describes the model.
    """

    def __init__(self, model: DecoderConfig, home: Path | None) -> None:
        self._model = model
        check_writable(model)
        try:
            if home is not None:
                home.mkdir(parents=True, exist_ok=True)
            self._temporary = tempfile.TemporaryDirectory(prefix="empg-jax-weights-", dir=home)
            self._home = Path(self._temporary.name)
            self._home.chmod(0o755)  # the server may be another user's
        except OSError as error:
            raise SamplerError(f"rollout.weights_dir={home} cannot be written: {error.strerror}") from None
        self._numbers = itertools.count(1)

    def write(self, params: Params, base: Params) -> Placed:
        """Write parameters, with adapters merged into their base."""
        number = next(self._numbers)
        placed = Placed(number, self._home / f"{number:06}")
        if self._model.lora is not None:
            params = merge(base, params, self._model.lora.scale, self._model.param_dtype)
        save_hf(params, dataclasses.replace(self._model, lora=None), placed.path)
        return placed

    def remove_before(self, placed: Placed) -> None:
        """Delete the weights that were written before these."""
        for path in self._home.iterdir():
            if path.name.isdigit() and int(path.name) < placed.number:
                shutil.rmtree(path)

    def remove(self, placed: Placed) -> None:
        """Delete these weights."""
        shutil.rmtree(placed.path)

    def close(self) -> None:
        """Delete everything."""
        self._temporary.cleanup()


def check_writable(model: DecoderConfig) -> None:
    """Check that the model can be written for other programs.

    Raises:
      SamplerError: no Hugging Face family describes it.
    """
    try:
        config_to_hf(model)
    except ValueError as error:
        raise SamplerError(
            f"rollout.engine=openai publishes weights as a Hugging Face folder: {error}"
        ) from None
