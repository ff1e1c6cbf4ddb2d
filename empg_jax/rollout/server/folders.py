"""Folders of published weights: safetensors that a server on the same file system loads."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import shutil
import tempfile
from pathlib import Path

from empg_jax.errors import writing
from empg_jax.hf.config import config_to_hf
from empg_jax.hf.save import save_hf
from empg_jax.models.decoder import DecoderConfig
from empg_jax.models.lora import merge
from empg_jax.rollout.server.answers import SamplerError
from empg_jax.types import Params

PREFIX = "empg-jax-weights-"
LOCK = "in-use"


@dataclasses.dataclass(frozen=True)
class Placed:
    """Weights on disk; later ones have higher numbers."""

    number: int
    path: Path


class Folders:
    """A temporary folder with one folder per set of weights. It is deleted when this object is closed.

    A process that is killed leaves its folder, which the next one with the same home deletes: the kernel
    gives the lock in it back.

    Args:
      model: the decoder's config.
      home: folder that the server sees, too; None takes the machine's folder of temporary files.

    Raises:
      SamplerError: the folder cannot be written, or no Hugging Face family describes the model.
    """

    def __init__(self, model: DecoderConfig, home: Path | None) -> None:
        self._model = model
        check_writable(model)
        with writing(f"rollout.weights_dir={home}", SamplerError):
            if home is not None:
                home.mkdir(parents=True, exist_ok=True)
            _remove_left(Path(home or tempfile.gettempdir()))
            self._temporary = tempfile.TemporaryDirectory(prefix=PREFIX, dir=home)
            self._home = Path(self._temporary.name)
            self._home.chmod(0o755)  # the server may be another user's
            # Gets its name when it is locked: nobody may take this folder for a dead process'.
            self._lock = (self._home / f"{LOCK}.new").open("wb")
            with contextlib.suppress(OSError):  # this file system has no locks
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (self._home / f"{LOCK}.new").rename(self._home / LOCK)
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
        self._lock.close()


def _remove_left(home: Path) -> None:
    """Delete the folders of processes that were killed."""
    for path in home.glob(f"{PREFIX}*/{LOCK}"):
        # Another user's folder, one that its process is just deleting, or one that is in use.
        with contextlib.suppress(OSError), path.open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent)


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
