"""The mapping between Hugging Face tensors and our parameters.

Hugging Face stores matrices as ``[out, in]``, one per layer, or one per layer and expert. Our parameters are
stacked: ``[layer, in, out]`` and ``[layer, expert, in, out]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from empg_jax.models.decoder import DecoderConfig, init_params
from empg_jax.types import Params

INDEX = "model.safetensors.index.json"
_TOP = {
    ("embed", "embedding"): "model.embed_tokens.weight",
    ("final_norm", "scale"): "model.norm.weight",
    ("head", "embedding"): "lm_head.weight",
}
_MODULES = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
    "router": "mlp.gate",
    "gate_experts": "mlp.experts.{}.gate_proj",
    "up_experts": "mlp.experts.{}.up_proj",
    "down_experts": "mlp.experts.{}.down_proj",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our parameters and its tensors in the files.

    Attributes:
      path: keys of the parameter.
      names: names of the tensors: one, or one per index of the stacked axes with the last axis fastest.
      stacked: sizes of the stacked axes: none, layers, or layers and experts.
      is_matrix: whether the tensors are transposed.
      shape: shape of the parameter.
      dtype: type of the parameter.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    stacked: tuple[int, ...]
    is_matrix: bool
    shape: tuple[int, ...]
    dtype: Any

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each tensor in the files."""
        own = self.shape[len(self.stacked) :]
        return own[::-1] if self.is_matrix else own


def list_leaves(config: DecoderConfig) -> Iterator[Leaf]:
    """Yield every parameter that Hugging Face has, in the tree's order; a critic's head is left out."""
    config = dataclasses.replace(config, value_head=False)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        path = tuple(entry.key for entry in key_path)
        if path[0] == "layers":
            stacked = leaf.shape[: 2 if path[1].endswith("_experts") else 1]
            names = tuple(tensor_name(path, *place) for place in np.ndindex(stacked))
        else:
            stacked, names = (), (_TOP[path],)
        yield Leaf(path, names, stacked, path[-1] == "kernel", leaf.shape, leaf.dtype)


def tensor_name(path: tuple[str, ...], layer: int, *expert: int) -> str:
    """Return the Hugging Face name of one layer's (and expert's) tensor of a stacked parameter."""
    return f"model.layers.{layer}.{_MODULES[path[1]].format(*expert)}.{_LEAVES[path[2]]}"


def get_leaf(tree: Params, path: tuple[str, ...]) -> Any:
    """Return the leaf at a path."""
    for key in path:
        tree = tree[key]
    return tree


def set_leaf(tree: Params, path: tuple[str, ...], value: Any) -> None:
    """Set the leaf at a path; missing dictionaries are created."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
