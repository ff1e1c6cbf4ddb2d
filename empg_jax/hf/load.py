"""Hugging Face checkpoints: Qwen2, Qwen3, Llama and Mistral, as safetensors.

Tensors are read one by one directly into (sharded) arrays. Each device's part is copied from the mapped file,
moved to the device, transposed there, and written into its place in the stacked parameter. A host therefore
holds about one tensor at a time and copies only the parts of its own devices. All tensors are checked before
the first array is created, and all problems are reported together. `save_hf` writes the same format
(`hf.save`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from empg_jax.hf.config import config_from_hf, read_hf_config
from empg_jax.hf.hub import find_folder
from empg_jax.hf.layout import INDEX, Leaf, get_leaf, list_leaves, set_leaf
from empg_jax.hf.safetensors import SafetensorsFile
from empg_jax.hf.save import save_hf as save_hf
from empg_jax.models.decoder import DecoderConfig
from empg_jax.models.quantize import quantize_module, scheme_of
from empg_jax.types import Params

_EMBEDDING = "model.embed_tokens.weight"
_COMPARED = 1 << 24  # numbers of two matrices that are compared at a time
_FILES = ("config.json", "generation_config.json", "*.safetensors", INDEX)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights files that are checked but not read yet.

    Attributes:
      leaves: the parameters to create.
      files: the file that holds each tensor.
    """

    leaves: list[Leaf]
    files: dict[str, SafetensorsFile]


def load_hf(
    path: str | pathlib.Path,
    config: DecoderConfig | None = None,
    *,
    shardings: Params | None = None,
    max_length: int | None = None,
    quantize: str = "none",
) -> tuple[DecoderConfig, Params]:
    """Load a model from a local folder or a hub id.

    Args:
      path: folder with config.json and safetensors (one file, or several with an index), or ``owner/name``.
      config: shapes and types to load into; None takes the shapes from config.json, and float32.
      shardings: a ``Sharding`` for every parameter, in a tree like the parameters. None loads everything to
        the default device.
      max_length: the longest row that will be used (see `config_from_hf`).
      quantize: format of the matrices (`models.quantize`). Each matrix is quantized right after it is read.

    Returns:
      The config and the parameters, in ``config.param_dtype``.

    Raises:
      FileNotFoundError: the folder, config.json or a weights file is missing.
      ValueError: tensors are missing, unexpected or misshaped (all are listed), the architecture is not
        supported, or a file is damaged.
    """
    folder = find_folder(path, _FILES, "model")
    if config is None:
        config = config_from_hf(read_hf_config(folder), max_length=max_length)
    weights = open_weights(folder, config)
    params: Params = {}
    for leaf in weights.leaves:
        if leaf.stacked:
            scheme = scheme_of(leaf.path[-2], quantize)
            module = _read_stacked(leaf, weights.files, shardings, scheme)
            for name, array in module.items():
                set_leaf(params, (*leaf.path[:-1], name), array)
        else:
            sharding = None if shardings is None else get_leaf(shardings, leaf.path)
            set_leaf(params, leaf.path, _read_tensor(leaf, leaf.names[0], weights.files, sharding))
    return config, params


def open_weights(path: str | pathlib.Path, config: DecoderConfig) -> Weights:
    """Check the weights files of a folder (or hub id) against a config; only the files' headers are read.

    Raises:
      FileNotFoundError: the folder or a weights file is missing.
      ValueError: tensors are missing, unexpected or misshaped (all are listed), or a file is damaged.
    """
    folder = find_folder(path, _FILES, "model")
    files = _open_files(folder)
    leaves = list(list_leaves(config))
    _check_tensors(folder, leaves, files, config.tie_embeddings)
    return Weights(leaves, files)


def _open_files(folder: pathlib.Path) -> dict[str, SafetensorsFile]:
    """Open the weights files; return the file of each tensor."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            absent = [name for name in names if not (folder / name).is_file()]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is not a safetensors index: {error!r}") from error
        if absent:
            raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, named in {INDEX}")
    else:
        names = ["model.safetensors"]
        if not (folder / names[0]).is_file():
            found = sorted(entry.name for entry in folder.iterdir())
            raise FileNotFoundError(f"{folder} holds neither {names[0]} nor {INDEX}; it holds {found}")
    files: dict[str, SafetensorsFile] = {}
    for file in (SafetensorsFile(folder / name) for name in names):
        files |= dict.fromkeys(file.names(), file)
    return files


def _check_tensors(
    folder: pathlib.Path, leaves: list[Leaf], files: Mapping[str, SafetensorsFile], tied: bool
) -> None:
    expected = {name: leaf.tensor_shape for leaf in leaves for name in leaf.names}
    missing = [name for name in expected if name not in files]
    wrong = [
        f"{name} is {list(files[name].shape(name))} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in files and files[name].shape(name) != shape
    ]
    # Old exports contain rotary tables, and a tied head may be stored twice. Both are redundant.
    redundant = {"lm_head.weight"} if tied else set()
    extra = [
        name
        for name in files
        if name not in expected | dict.fromkeys(redundant) and not name.endswith("inv_freq")
    ]
    problems = [("missing", missing), ("unexpected", extra), ("misshaped", wrong)]
    if any(names for _, names in problems):
        listed = "\n".join(f"  {kind}: {name}" for kind, names in problems for name in names)
        raise ValueError(f"the tensors in {folder} do not fit the model:\n{listed}")
    if tied and "lm_head.weight" in files and not _are_equal(files, "lm_head.weight", _EMBEDDING):
        raise ValueError(
            f"{folder} has a head of its own (lm_head.weight differs from {_EMBEDDING}), but its config.json "
            "says that they are tied: set tie_word_embeddings to false there"
        )


def _are_equal(files: Mapping[str, SafetensorsFile], one: str, other: str) -> bool:
    """Compare two matrices, some rows at a time."""
    first, second = files[one].array(one), files[other].array(other)
    rows = max(1, _COMPARED // max(1, first[:1].size))
    return first.shape == second.shape and all(
        np.array_equal(first[i : i + rows], second[i : i + rows]) for i in range(0, len(first), rows)
    )


# ------------------------------------------------------------------------------------------- reading


def _read_tensor(leaf: Leaf, name: str, files: Mapping[str, SafetensorsFile], sharding: Any) -> jax.Array:
    """Read one tensor, split it over devices, and transpose it to ``[in, out]``."""
    view = files[name].array(name)
    parts: dict[tuple[Any, ...], np.ndarray] = {}

    def read(index: Any) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index)
        if key not in parts:  # devices that hold the same part share one copy of it
            parts[key] = copy_part(view, index, leaf.dtype)
        return parts[key]

    if sharding is None:
        array = jnp.asarray(read((slice(None),) * view.ndim))
    else:
        stored = _transposed(sharding) if leaf.is_matrix else sharding
        array = jax.make_array_from_callback(view.shape, stored, read)
    # By XLA, in a program of its own: NumPy's transposition of a large matrix takes several times as long,
    # and so does XLA:CPU's where it is fused with the writing into the stack.
    return array.T if leaf.is_matrix else array


def copy_part(view: np.ndarray, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """Copy a part of a mapped tensor to memory. All bytes of weights files are read here."""
    return np.array(view[index], dtype, order="C")


def _read_stacked(
    leaf: Leaf, files: Mapping[str, SafetensorsFile], shardings: Params | None, quantize: str
) -> Params:
    """Read all tensors of a parameter into one stacked array, or into the arrays of its quantized form."""
    name, depth = leaf.path[-1], len(leaf.stacked)
    one = jax.ShapeDtypeStruct(leaf.shape[depth:], leaf.dtype)
    kept = jax.eval_shape(lambda kernel: quantize_module({name: kernel}, quantize), one)
    stacked_shapes = {k: jax.ShapeDtypeStruct((*leaf.stacked, *s.shape), s.dtype) for k, s in kept.items()}
    places, part_place = None, None
    if shardings is not None:
        places = {k: get_leaf(shardings, (*leaf.path[:-1], k)) for k in kept}
        # The first array holds the kernel or its codes, and the codes have the axes of the matrix.
        part_place = _of_one(next(iter(places.values())), depth)
    start, insert = _stacking(name, quantize, _frozen(stacked_shapes), _frozen(places))
    stacked = start()
    for place, tensor in zip(np.ndindex(leaf.stacked), leaf.names, strict=True):
        part = _read_tensor(leaf, tensor, files, part_place)
        # Wait for each insertion: with asynchronous dispatch the parts of many tensors would fill the memory.
        stacked = jax.block_until_ready(insert(stacked, part, np.array(place, np.int32)))
        del part  # before the next one is read
    return stacked


def _frozen(table: dict[str, Any] | None) -> tuple[tuple[str, Any], ...] | None:
    return None if table is None else tuple(table.items())


def _of_one(sharding: jax.sharding.Sharding, depth: int) -> jax.sharding.Sharding:
    """Return the sharding of one tensor, given the sharding of an array with ``depth`` stacked axes."""
    if isinstance(sharding, jax.NamedSharding):
        return jax.NamedSharding(sharding.mesh, jax.P(*sharding.spec[depth:]))
    return sharding


def _transposed(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Return the sharding of a matrix's transpose."""
    if isinstance(sharding, jax.NamedSharding):
        rows, columns = (*sharding.spec, None, None)[:2]
        return jax.NamedSharding(sharding.mesh, jax.P(columns, rows))
    return sharding


def _put(stacked: jax.Array, part: jax.Array, place: jax.Array) -> jax.Array:
    block = part.reshape((1,) * len(place) + part.shape)
    return jax.lax.dynamic_update_slice(stacked, block, (*place, *(jnp.int32(0),) * part.ndim))


@functools.cache
def _stacking(name: str, quantize: str, shapes: tuple, places: tuple | None) -> tuple[Any, Any]:
    """Return two programs: one creates an empty stack, the other writes a tensor into it in place."""

    def start() -> Params:
        return {k: jnp.zeros(s.shape, s.dtype) for k, s in shapes}

    def insert(stacked: Params, part: jax.Array, place: jax.Array) -> Params:
        parts = quantize_module({name: part}, quantize)
        return {k: _put(stacked[k], parts[k], place) for k in parts}

    out = None if places is None else dict(places)
    return jax.jit(start, out_shardings=out), jax.jit(insert, donate_argnums=0, out_shardings=out)
