"""Saved weights on disk: one folder for a name, complete or absent.

::

    SAVE_DIR/<model>/weights/<name>/          weights.safetensors, meta.json, and adam.safetensors
    SAVE_DIR/<model>/sampler_weights/<name>/  weights.safetensors, meta.json

On the wire they are called ``tinker://<model>/weights/<name>``.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from empg_jax.hf.safetensors import SafetensorsFile, write_safetensors
from empg_jax.serve.tinker.trainer import Moments
from empg_jax.serve.wire import ApiError, refuse
from empg_jax.types import Params

TRAINING, SAMPLING = "weights", "sampler_weights"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_PATH = re.compile(rf"tinker://([A-Za-z0-9:-]+)/({TRAINING}|{SAMPLING})/({_NAME})")
Stamp = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Saved:
    """What is saved: trained parameters, maybe with the optimizer's state, and their version."""

    params: Params
    moments: Moments | None
    version: int


class Store:
    """The saved weights of one server.

    Args:
      folder: where they are.
      base_model: name of the model; weights of another one are refused.
      like: parameters whose names, shapes and types saved ones must have.
    """

    def __init__(self, folder: Path, base_model: str, like: Params) -> None:
        self.folder, self._base_model = folder, base_model
        self._like, self._structure = _flatten(like), jax.tree.structure(like)

    def save(self, model_id: str, kind: str, name: Any, saved: Saved, *, overwrite: bool = False) -> str:
        """Write weights under a name.

        Returns:
          Their path on the wire.

        Raises:
          ApiError: the name is taken or no file name, or the folder cannot be written.
        """
        if not isinstance(name, str) or re.fullmatch(_NAME, name) is None:
            raise refuse(
                f"{name!r} is no name for weights: use letters, digits, dots, dashes and underscores"
            )
        folder = self._folder(model_id, kind, name)
        if folder.exists() and not overwrite:
            raise refuse(f"weights {name!r} exist already; use another name, or overwrite=true")
        meta: dict[str, Any] = {"base_model": self._base_model, "version": saved.version}
        part = folder.parent / f".{name}-{secrets.token_hex(4)}"
        try:
            part.mkdir(parents=True)
            _write(part / "weights.safetensors", saved.params)
            if (moments := saved.moments) is not None:
                meta["count"] = int(moments.count)
                _write(part / "adam.safetensors", {"mu": moments.mu, "nu": moments.nu})
            (part / "meta.json").write_text(json.dumps(meta), "utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise ApiError(
                500, f"weights {name!r} cannot be saved in {folder.parent}: {error.strerror}"
            ) from None
        return f"tinker://{model_id}/{kind}/{name}"

    def load(self, path: Any) -> Params:
        """Read the weights of a path.

        Raises:
          ApiError: there are none, or they belong to another model or have another type.
        """
        return self._read(path, "weights.safetensors", self._like, self._structure)

    def version(self, path: Any) -> int:
        """Return the version that the weights of a path had.

        Raises:
          ApiError: there are none.
        """
        return int(self._meta(path).get("version", 0))

    def stamp(self, path: Any) -> Stamp:
        """Return what tells the weights of a path from others that are saved in their place.

        Raises:
          ApiError: there are none.
        """
        try:
            found = (self._find(path) / "meta.json").stat()
        except OSError:
            raise _missing(path) from None
        return found.st_ino, found.st_mtime_ns

    def load_moments(self, path: Any) -> Moments:
        """Read the optimizer's state of a path.

        Raises:
          ApiError: there is none.
        """
        wide = {name: leaf.astype(np.float32) for name, leaf in self._like.items()}
        like = {f"{half}/{name}": leaf for half in ("mu", "nu") for name, leaf in wide.items()}
        halves = self._read(path, "adam.safetensors", like, None)
        trees = [
            jax.tree.unflatten(self._structure, [halves[f"{half}/{name}"] for name in self._like])
            for half in ("mu", "nu")
        ]
        count = np.int32(self._meta(path)["count"])
        return optax.ScaleByAdamState(count=count, mu=trees[0], nu=trees[1])

    def _read(self, path: Any, file: str, like: dict[str, np.ndarray], structure: Any) -> Any:
        if self._meta(path).get("base_model") != self._base_model:
            raise refuse(f"{path} holds weights of another model than {self._base_model}")
        try:
            found = SafetensorsFile(self._find(path) / file)
        except (OSError, ValueError) as error:
            raise refuse(f"{path}: {file} cannot be read: {error}") from None
        for name, leaf in like.items():
            if name not in found.names() or found.shape(name) != leaf.shape:
                raise refuse(f"{path} holds weights of another model: {name} is missing or has another shape")
        arrays = {name: np.array(found.array(name)) for name in like}
        for name, array in arrays.items():
            if array.dtype != like[name].dtype:
                types = f"{array.dtype}, not {like[name].dtype}"
                raise refuse(f"{path}: {name} is {types}, as a server with another model.dtype saved it")
        return arrays if structure is None else jax.tree.unflatten(structure, list(arrays.values()))

    def _meta(self, path: Any) -> dict[str, Any]:
        try:
            return dict(json.loads((self._find(path) / "meta.json").read_text("utf-8")))
        except (OSError, ValueError):
            raise _missing(path) from None

    def _find(self, path: Any) -> Path:
        match = _PATH.fullmatch(path) if isinstance(path, str) else None
        if match is None:
            raise refuse(f"{path!r} is no path of weights: expected tinker://MODEL/{TRAINING}/NAME", "path")
        return self._folder(*match.groups())

    def _folder(self, model_id: str, kind: str, name: str) -> Path:
        return self.folder / model_id.replace(":", "-") / kind / name


def _missing(path: Any) -> ApiError:
    return ApiError(404, f"there are no weights {path}", param="path")


def _flatten(tree: Params) -> dict[str, np.ndarray]:
    """List the leaves by names, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in leaves}


def _write(file: Path, tree: Params) -> None:
    arrays = _flatten(tree)
    write_safetensors(file, {n: (leaf.shape, leaf.dtype) for n, leaf in arrays.items()}, arrays.__getitem__)
