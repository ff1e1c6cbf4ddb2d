"""Export of adapters as a folder that PEFT and vLLM load with the base model (``adapter_model.safetensors``).

PEFT names a layer's matrices ``base_model.model.<module>.lora_A.weight [r in]`` and ``lora_B.weight``
``[out r]``. It scales their product by ``lora_alpha / r``, like `models.lora`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from empg_jax.hf.layout import tensor_name
from empg_jax.hf.safetensors import write_safetensors
from empg_jax.hf.save import Tokenizer, new_folder, to_host, write_json
from empg_jax.models.lora import LoraConfig
from empg_jax.types import Params

_HALVES = {"lora_a": "lora_A", "lora_b": "lora_B"}


def save_adapter(
    adapters: Params,
    config: LoraConfig,
    folder: str | pathlib.Path,
    *,
    base_path: str,
    tokenizer: Tokenizer | None = None,
    dtype: Any = np.float32,
) -> None:
    """Write adapters for PEFT.

    The folder appears only when it is complete; an empty one stays empty until then. With several processes,
    all must call this function; the first process writes.

    Args:
      adapters: stacked adapters; a critic's head is left out.
      config: their rank and scale.
      folder: target folder; it must be empty or not exist.
      base_path: folder or hub id of the base model, written to PEFT's config.
      tokenizer: if given, its files are added.
      dtype: type of the tensors in the file.

    Raises:
      FileExistsError: the folder is not empty.
      RunError: it cannot be written.
    """
    sources = {name: (array, layer) for name, array, layer in _tensors(adapters)}

    def read(name: str) -> np.ndarray:
        array, layer = sources[name]
        return to_host(array[layer].T).astype(dtype)

    shapes = {n: (array.shape[:0:-1], np.dtype(dtype)) for n, (array, _) in sources.items()}
    with new_folder(folder) as partial:
        if jax.process_index() == 0:
            write_json(partial / "adapter_config.json", _peft_config(shapes, config, base_path))
            if tokenizer is not None:
                tokenizer.save(partial)
            write_safetensors(partial / "adapter_model.safetensors", shapes, read)
        else:
            for name in shapes:  # fetching a sharded array is a collective, so every process takes part
                read(name)


def _tensors(adapters: Params) -> Iterator[tuple[str, jax.Array, int]]:
    """Yield PEFT's name, our stacked array, and the layer of every tensor."""
    for key_path, array in jax.tree_util.tree_leaves_with_path({"layers": adapters["layers"]}):
        path = tuple(entry.key for entry in key_path)
        for layer in range(array.shape[0]):
            module = tensor_name((*path[:-1], "kernel"), layer).removesuffix(".weight")
            yield f"base_model.model.{module}.{_HALVES[path[-1]]}.weight", array, layer


def _peft_config(names: Iterable[str], config: LoraConfig, base_path: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_path,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": 0.0,
        # The modules' names in the file, not ours: a router is called ``gate`` there.
        "target_modules": sorted({name.split(".")[-3] for name in names}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
    }
