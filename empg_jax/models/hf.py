"""Hugging Face checkpoints in and out: Qwen2, Qwen3, Llama and Mistral, as safetensors.

Reading goes straight into (sharded) arrays: each device's part is cut out of the mapped files, so a host
holds about one parameter at a time and reads only what its devices need. Everything is checked before the
first array is made, and all problems are listed together.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from empg_jax.hub import find_folder
from empg_jax.models.decoder import DecoderConfig
from empg_jax.models.hf_config import config_from_hf, config_to_hf, read_hf_config
from empg_jax.models.hf_layout import Leaf, get_leaf, list_leaves, set_leaf
from empg_jax.models.safetensors_file import SafetensorsFile, write_safetensors
from empg_jax.text.tokenizer import Tokenizer
from empg_jax.types import Params

_INDEX = "model.safetensors.index.json"
_FILES = ("config.json", "generation_config.json", "*.safetensors", _INDEX)


def load_hf(
    path: str | pathlib.Path,
    config: DecoderConfig | None = None,
    *,
    shardings: Params | None = None,
    max_length: int | None = None,
) -> tuple[DecoderConfig, Params]:
    """Loads a model from a local folder or a hub id.

    Args:
      path: folder with config.json and safetensors (one file, or several with an index), or ``owner/name``.
      config: shapes and types to load into; None takes the shapes from config.json and float32.
      shardings: a ``Sharding`` for every parameter, in a tree like the parameters; None puts all of it on the
        default device.
      max_length: the longest row that will be used (see `config_from_hf`).

    Returns:
      The config and the parameters, in ``config.param_dtype``.

    Raises:
      FileNotFoundError: when the folder, config.json or a weights file is missing.
      ValueError: listing all missing, unexpected and misshaped tensors; for an unsupported architecture; for
        a damaged file.
    """
    folder = find_folder(path, _FILES, "model")
    if config is None:
        config = config_from_hf(read_hf_config(folder), max_length=max_length)
    files = _open_files(folder)
    leaves = list(list_leaves(config))
    _check_tensors(folder, leaves, files, config.tie_embeddings)
    params: Params = {}
    for leaf in leaves:
        sharding = None if shardings is None else get_leaf(shardings, leaf.path)
        set_leaf(params, leaf.path, _read_leaf(leaf, files, sharding))
    return config, params


def save_hf(
    params: Params,
    config: DecoderConfig,
    folder: str | pathlib.Path,
    tokenizer: Tokenizer | None = None,
    *,
    base_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a folder that ``transformers.AutoModelForCausalLM`` and vLLM load.

    The folder appears only when it is complete. With several processes all must call this; the first writes.

    Args:
      params: the parameters (sharded ones too); a critic's value head is left out.
      config: their config.
      folder: must not exist or be empty.
      tokenizer: its files are added, and its stop tokens go into generation_config.json.
      base_config: the config.json that the model came from; keys unknown to the decoder are kept.
      max_shard_bytes: weights files are split at this size.

    Raises:
      FileExistsError: when the folder has contents.
      ValueError: when no Hugging Face family fits the config, the parameters do not fit it, or the tokenizer
        has more tokens than the model; nothing is written then.
    """
    target = pathlib.Path(folder)
    if target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty: export into a new folder")
    keys = config_to_hf(config, base_config)
    leaves = _check_params(params, config)
    if tokenizer is not None:
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}"
            )
        keys |= {"eos_token_id": tokenizer.stop_ids[0], "pad_token_id": tokenizer.pad_id}
    is_writer = jax.process_index() == 0
    partial = target.with_name(target.name + ".partial")
    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_json(partial / "config.json", keys)
        if tokenizer is not None:
            tokenizer.save(partial)
            stops = {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
            _write_json(partial / "generation_config.json", stops)
    _write_weights(partial, params, leaves, max_shard_bytes, is_writer)
    if is_writer:
        partial.replace(target)


# ------------------------------------------------------------------------------------------- reading


def _open_files(folder: pathlib.Path) -> dict[str, SafetensorsFile]:
    """Returns the file that holds each tensor."""
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} is not a safetensors index: {error!r}") from error
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, named in {_INDEX}")
    else:
        names = ["model.safetensors"]
        if not (folder / names[0]).is_file():
            found = sorted(entry.name for entry in folder.iterdir())
            raise FileNotFoundError(f"{folder} holds neither {names[0]} nor {_INDEX}; it holds {found}")
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
    # Rotary tables of old exports and a second copy of a tied head carry nothing of their own.
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


def _read_leaf(leaf: Leaf, files: Mapping[str, SafetensorsFile], sharding: Any) -> jax.Array:
    def read(index: Any) -> np.ndarray:
        if not leaf.is_stacked:
            return tensor(leaf.names[0], index).astype(leaf.dtype)
        names = leaf.names[index[0]]
        lengths = [len(range(size)[part]) for size, part in zip(leaf.shape, index, strict=True)]
        stacked = np.empty(lengths, leaf.dtype)
        for position, name in enumerate(names):
            stacked[position] = tensor(name, index[1:])
        return stacked

    def tensor(name: str, index: tuple[slice, ...]) -> np.ndarray:
        array = files[name].array(name)
        return array[index[::-1]].T if leaf.is_matrix else array[index]

    if sharding is None:
        return jnp.asarray(read((slice(None),) * len(leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, sharding, read)


# ------------------------------------------------------------------------------------------- writing


def _check_params(params: Params, config: DecoderConfig) -> list[Leaf]:
    """Returns the leaves with the types that the parameters have."""
    leaves = list(list_leaves(config))
    params = {name: part for name, part in params.items() if name != "value_head"}
    found = {
        tuple(entry.key for entry in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    expected = {leaf.path: leaf.shape for leaf in leaves}
    problems = [f"missing {'/'.join(path)}" for path in expected if path not in found]
    problems += [f"unexpected {'/'.join(path)}" for path in found if path not in expected]
    problems += [
        f"{'/'.join(path)} is {list(found[path].shape)} instead of {list(shape)}"
        for path, shape in expected.items()
        if path in found and found[path].shape != shape
    ]
    if problems:
        raise ValueError("the parameters do not fit the config: " + "; ".join(problems))
    return [dataclasses.replace(leaf, dtype=found[leaf.path].dtype) for leaf in leaves]


def _write_weights(
    folder: pathlib.Path, params: Params, leaves: list[Leaf], max_shard_bytes: int, is_writer: bool
) -> None:
    sources = {name: (leaf, layer) for leaf in leaves for layer, name in enumerate(leaf.names)}

    def read(name: str) -> np.ndarray:
        leaf, layer = sources[name]
        array = get_leaf(params, leaf.path)
        host = _to_host(array[layer] if leaf.is_stacked else array)
        return host.T if leaf.is_matrix else host

    shards = _split(
        {name: (leaf.tensor_shape, np.dtype(leaf.dtype)) for name, (leaf, _) in sources.items()},
        max_shard_bytes,
    )
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        file = (
            f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        )
        weight_map |= dict.fromkeys(shapes, file)
        if is_writer:
            write_safetensors(folder / file, shapes, read)
        else:
            for name in shapes:  # fetching is a collective: every process takes part
                read(name)
    if is_writer and len(shards) > 1:
        total = sum(_num_bytes(*shape) for shapes in shards for shape in shapes.values())
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _split(
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]], max_bytes: int
) -> list[dict[str, tuple[tuple[int, ...], np.dtype]]]:
    shards: list[dict[str, tuple[tuple[int, ...], np.dtype]]] = [{}]
    filled = 0
    for name, (shape, dtype) in shapes.items():
        size = _num_bytes(shape, dtype)
        if shards[-1] and filled + size > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (shape, dtype)
        filled += size
    return shards


def _num_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _to_host(array: Any) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils  # only with several processes

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _write_json(file: pathlib.Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
