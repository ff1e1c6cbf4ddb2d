"""Export of a model folder that ``transformers`` and vLLM load: config.json, safetensors, tokenizer.

The folder is written under a temporary name and renamed when it is complete. A folder that is there already
gets its files then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from empg_jax.errors import writing
from empg_jax.hf.config import config_to_hf
from empg_jax.hf.layout import INDEX, Leaf, get_leaf, list_leaves
from empg_jax.hf.safetensors import write_safetensors
from empg_jax.models.decoder import DecoderConfig
from empg_jax.types import Params

MAX_SHARD_BYTES = 5 * 10**9


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a tokenizer that an export needs."""

    vocab_size: int
    pad_id: int
    stop_ids: tuple[int, ...]

    def save(self, folder: str | pathlib.Path) -> None:
        """Write the tokenizer's files, and its stop tokens to ``generation_config.json``."""


def save_hf(
    params: Params,
    config: DecoderConfig,
    folder: str | pathlib.Path,
    tokenizer: Tokenizer | None = None,
    *,
    base_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that ``transformers.AutoModelForCausalLM`` and vLLM load.

    The folder appears only when it is complete; an empty one stays empty until then. With several processes,
    all must call this function; the first process writes.

    Args:
      params: the parameters, sharded or not. A critic's value head is left out.
      config: their config.
      folder: target folder; it must be empty or not exist.
      tokenizer: if given, its files are added, among them generation_config.json.
      base_config: the model's original config.json; keys unknown to the decoder are kept.
      max_shard_bytes: largest size of one weights file.

    Raises:
      FileExistsError: the folder is not empty.
      ValueError: no Hugging Face architecture matches the config, the parameters do not match it, or the
        tokenizer has more tokens than the model. Nothing is written then.
      RunError: the folder cannot be written.
    """
    keys = config_to_hf(config, base_config)
    leaves = _check_params(params, config)
    if tokenizer is not None:
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}"
            )
        keys |= {"eos_token_id": tokenizer.stop_ids[0], "pad_token_id": tokenizer.pad_id}
    keys["torch_dtype"] = np.dtype(leaves[0].dtype).name
    with new_folder(folder) as partial:
        if jax.process_index() == 0:
            write_json(partial / "config.json", keys)
            if tokenizer is not None:
                tokenizer.save(partial)
        _write_weights(partial, params, leaves, max_shard_bytes)


@contextlib.contextmanager
def new_folder(folder: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary folder; rename it to ``folder`` on success, and delete it after an exception.

    An empty ``folder`` stays, and the files are moved into it: it may be a mount point or the working folder.

    Raises:
      FileExistsError: ``folder`` is not empty.
      RunError: it cannot be written.
    """
    target = pathlib.Path(folder).resolve()
    is_there = target.is_dir()
    # In the same file system, so that renaming is atomic.
    partial = target / ".partial" if is_there else target.with_name(target.name + ".partial")
    # Another process may have begun already.
    if target.exists() and (not is_there or any(entry != partial for entry in target.iterdir())):
        raise FileExistsError(f"{target} is not empty: export into a new folder")
    is_writer = jax.process_index() == 0
    try:
        with writing(target):
            if is_writer:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            yield partial
            if is_writer and is_there:
                # config.json last: it makes a model of them
                for file in sorted(partial.iterdir(), reverse=True):
                    file.rename(target / file.name)
            elif is_writer:
                partial.rename(target)
    finally:
        if is_writer:
            shutil.rmtree(partial, ignore_errors=True)


def _check_params(params: Params, config: DecoderConfig) -> list[Leaf]:
    """Check the parameters' paths and shapes; return the leaves with the parameters' types."""
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


def _write_weights(folder: pathlib.Path, params: Params, leaves: list[Leaf], max_shard_bytes: int) -> None:
    is_writer = jax.process_index() == 0
    sources = {
        name: (leaf, place)
        for leaf in leaves
        for place, name in zip(np.ndindex(leaf.stacked), leaf.names, strict=True)
    }

    def read(name: str) -> np.ndarray:
        leaf, place = sources[name]
        tensor = get_leaf(params, leaf.path)[place]
        # XLA transposes: NumPy takes many times as long for a large matrix.
        return to_host(tensor.T if leaf.is_matrix else tensor)

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
            for name in shapes:  # fetching a sharded array is a collective, so every process takes part
                read(name)
    if is_writer and len(shards) > 1:
        total = sum(_num_bytes(*shape) for shapes in shards for shape in shapes.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


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


def to_host(array: Any) -> np.ndarray:
    """Return a whole array as NumPy on every process; with several processes this is a collective."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils  # only with several processes

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def write_json(file: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
