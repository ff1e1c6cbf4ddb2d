"""Logical axes of every parameter. `parallel.mesh.RULES` map them to axes of the device mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from empg_jax.models.quantize import SCHEMES
from empg_jax.parallel.layout import gather_weight
from empg_jax.parallel.mesh import Axis, Blocks, tree_shardings
from empg_jax.types import Params

# Axes (in, out) of each module's matrix.
_KERNEL_AXES: dict[str, tuple[str | None, str | None]] = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
    # One matrix per expert; the experts stand before its axes.
    "gate_experts": ("embed", None),
    "up_experts": ("embed", None),
    "down_experts": (None, "embed"),
    "router": ("embed", None),
}
# Axes of its module's matrix that a leaf has (0: in, 1: out). None stands for an axis that is never split.
_LEAF_AXES: dict[str, tuple[int | None, ...]] = {
    "kernel": (0, 1),
    "bias": (1,),
    "lora_a": (0, None),
    "lora_b": (None, 1),
    **{
        leaf: axes
        for scheme in SCHEMES.values()
        for leaf, axes in zip(scheme.leaves, scheme.axes, strict=True)
    },
}
_PACKED = SCHEMES["nf4"].leaves
_SENT = ("kernel", "bias", "lora_a", "lora_b")  # leaves that the computation takes in its own type


def param_axes(params: Params, head_dim: int = 1) -> Params:
    """Return the logical axes of every parameter, in a tree of the same structure.

    Args:
      params: stacked parameters or their shapes, including adapters and quantized matrices.
      head_dim: width of a head. An axis of heads is only split between heads, never inside one.
    """

    def axes_of(path: tuple[Any, ...], leaf: Any) -> tuple[Axis, ...]:
        names = [entry.key for entry in path]
        if names[-1] == "embedding":
            return ("vocab", "embed")
        if names[0] == "value_head":
            return ("embed",) if names[-1] == "kernel" else ()
        if names[0] == "layers":
            return ("layers", *_layer_axes(names[1:], head_dim))
        return _layer_axes(names, head_dim)

    return jax.tree_util.tree_map_with_path(axes_of, params)


def param_shardings(mesh: Mesh, params: Params, head_dim: int) -> Params:
    """Return the sharding of every parameter (arguments as in `param_axes`)."""
    return tree_shardings(mesh, param_axes(params, head_dim), params)


def gather_layer(layer: Params, head_dim: int, dtype: Any, reduce_dtype: Any) -> Params:
    """Return a single layer's parameters as the layer needs them: whole, those of its products in ``dtype``.

    Args:
      layer: the layer's parameters, split.
      head_dim: width of a head.
      dtype: type in which matrices and biases are sent; the computation's is often smaller than the
        parameter's.
      reduce_dtype: type in which their gradients are added up over devices.
    """
    kept = max(dtype, reduce_dtype, key=lambda each: jnp.dtype(each).itemsize)

    def gather(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = [entry.key for entry in path]
        axes = _layer_axes(names, head_dim)
        if names[-1] not in _SENT:
            return gather_weight(leaf, axes)
        return gather_weight(leaf.astype(kept), axes, dtype)

    return jax.tree_util.tree_map_with_path(gather, layer)


def repeat_kv_heads(params: Params, head_dim: int, times: int) -> Params:
    """Return stacked parameters with every key/value head ``times`` times in a row, which computes the same.

    A mesh can then split the heads, and with them the KV cache, over more devices than there are heads.
    """

    def repeat(leaf: jax.Array, axes: tuple[Axis, ...]) -> jax.Array:
        for axis, name in enumerate(axes):
            if isinstance(name, Blocks) and name.axis == "kv_heads":
                heads = leaf.shape[axis] // name.size
                apart = leaf.reshape(*leaf.shape[:axis], heads, name.size, *leaf.shape[axis + 1 :])
                repeated = jnp.repeat(apart, times, axis=axis)
                leaf = repeated.reshape(*leaf.shape[:axis], -1, *leaf.shape[axis + 1 :])
        return leaf

    return jax.tree.map(repeat, params, param_axes(params, head_dim))


def _layer_axes(names: list[str], head_dim: int) -> tuple[Axis, ...]:
    if names[-1] not in _LEAF_AXES:
        return (None,)
    matrix = _KERNEL_AXES[names[-2]]
    own = [None if axis is None else matrix[axis] for axis in _LEAF_AXES[names[-1]]]
    if names[-2].endswith("_experts"):
        return ("experts", *own)
    # nf4 stores several numbers of the input axis in one byte, so this axis cannot be split by heads.
    whole = {"heads", "kv_heads"} - ({matrix[0]} if names[-1] in _PACKED else set())
    return tuple(Blocks(a, head_dim) if a in whole and head_dim > 1 else a for a in own)
