"""Weight-only quantization of frozen matrices: int8 per output channel, and 4-bit NormalFloat in blocks.

In its module a quantized matrix has other names than ``kernel`` (`Scheme.leaves`). The linear layer finds it
by these names. Only frozen matrices can be quantized.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from empg_jax.types import Params

BLOCK = 64  # numbers along the input axis that share a scale (nf4)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A quantized format of a matrix ``[..., in, out]``.

    Attributes:
      leaves: names of the arrays that replace the kernel.
      axes: axes of the matrix that each of these arrays has (0: in, 1: out).
      quantize: function from a kernel with any leading axes to these arrays.
      unpack: function from ``(dtype, *arrays)`` to a matrix ``[in, out]`` of that type and column scales
        (float32 ``[out]``, or None). The scales are applied after the product, where they cost less.
      packing: how many numbers of the input axis share one stored number.
    """

    leaves: tuple[str, ...]
    axes: tuple[tuple[int, ...], ...]
    quantize: Callable[[jax.Array], tuple[jax.Array, ...]]
    unpack: Callable[..., tuple[jax.Array, jax.Array | None]]
    packing: int = 1


# ---------------------------------------------------------------------------------------------- int8


def quantize_int8(kernel: Float[Array, "*layers D E"]) -> tuple[Array, Array]:
    """Quantize each column to int8.

    Returns:
      Codes ``int8[..., D, E]`` in -127 .. 127, and scales ``float32[..., E]``: the column's largest magnitude
      divided by 127.
    """
    wide = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-2, keepdims=True) / 127.0
    codes = jnp.round(wide / jnp.where(scale == 0, jnp.float32(1.0), scale)).astype(jnp.int8)
    return codes, jnp.squeeze(scale, -2)


def unpack_int8(dtype: Any, codes: Array, scale: Array) -> tuple[Array, Array]:
    """Return the codes converted to ``dtype``, which is exact for every float type, and the scales."""
    return codes.astype(dtype), scale


# ----------------------------------------------------------------------------------------------- nf4


@functools.cache
def normal_float_table() -> tuple[float, ...]:
    """Compute the 16 levels of NormalFloat4 in [-1, 1] (QLoRA, arXiv 2305.14314, section 3 and appendix E).

    The levels are quantiles of the standard normal, scaled to [-1, 1]. Eight lie above zero and seven below,
    each side with evenly spaced probabilities, so that zero itself is a level. The outermost probability is
    the mean of 1 - 1/32 and 1 - 1/30: half a step from 1 for sixteen and for fifteen levels.
    """
    outermost = (1 - 1 / 32 + 1 - 1 / 30) / 2
    quantile = statistics.NormalDist().inv_cdf
    positive = [quantile(outermost + (0.5 - outermost) * i / 8) for i in range(8)]
    negative = [-quantile(outermost + (0.5 - outermost) * i / 7) for i in range(7)]
    levels = sorted([*positive, 0.0, *negative])
    return tuple(level / levels[-1] for level in levels)


def quantize_nf4(kernel: Float[Array, "*layers D E"]) -> tuple[Array, Array]:
    """Quantize blocks of the input axis to 4-bit NormalFloat.

    A ``[out, in]`` matrix that is read row by row has the same blocks.

    Returns:
      Codes ``uint8[..., D/2, E]``, two per byte along the input axis, and scales
      ``float32[..., D/block, E]``: the largest magnitude of each block.

    Raises:
      ValueError: the input axis is odd.
    """
    *layers, depth, width = kernel.shape
    if depth % 2:
        raise ValueError(f"nf4 packs pairs along the input axis, which is {depth}: use int8")
    block = math.gcd(depth, BLOCK)
    blocks = kernel.astype(jnp.float32).reshape(*layers, depth // block, block, width)
    scale = jnp.max(jnp.abs(blocks), axis=-2, keepdims=True)
    level = jnp.asarray(normal_float_table(), jnp.float32)
    # The nearest level is the number of midpoints between neighboring levels below the value.
    borders = (level[1:] + level[:-1]) / 2
    unit = blocks / jnp.where(scale == 0, jnp.float32(1.0), scale)
    codes = jnp.searchsorted(borders, unit).astype(jnp.uint8).reshape(*layers, depth // 2, 2, width)
    packed = codes[..., 0, :] | (codes[..., 1, :] << jnp.uint8(4))
    return packed, jnp.squeeze(scale, -2)


def unpack_nf4(dtype: Any, packed: Array, scale: Array) -> tuple[Array, None]:
    """Return the matrix, computed in float32 and rounded once to ``dtype``; there are no column scales."""
    codes = jnp.stack([packed & jnp.uint8(15), packed >> jnp.uint8(4)], axis=1)
    levels = jnp.asarray(normal_float_table(), jnp.float32)[codes]
    blocks = levels.reshape(scale.shape[0], -1, scale.shape[1]) * scale[:, None, :]
    return blocks.reshape(-1, scale.shape[1]).astype(dtype), None


# ---------------------------------------------------------------------------------------------- trees

SCHEMES = {
    "int8": Scheme(("kernel_int8", "kernel_scale"), ((0, 1), (1,)), quantize_int8, unpack_int8),
    "nf4": Scheme(("kernel_nf4", "block_scale"), ((0, 1), (0, 1)), quantize_nf4, unpack_nf4, packing=2),
}
# Names of arrays that keep their stored type in every copy: a conversion of codes or scales would destroy a
# matrix, and the learner multiplies by the scale of a norm in float32.
UNCAST_LEAVES = frozenset(leaf for scheme in SCHEMES.values() for leaf in scheme.leaves) | {"scale"}


def cast_params(params: Params, dtype: Any) -> Params:
    """Convert parameters to the type that computations take, but for `UNCAST_LEAVES`."""

    def cast(path: tuple[Any, ...], leaf: Array) -> Array:
        return leaf if path[-1].key in UNCAST_LEAVES else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def quantize_params(params: Params, scheme: str) -> Params:
    """Quantize every layer's matrices; embeddings, head, routers, norms and biases are kept unchanged.

    Args:
      params: stacked parameters.
      scheme: ``none``, or a key of `SCHEMES`.
    """
    if scheme == "none":
        return params
    layers = {
        name: quantize_module(module, scheme_of(name, scheme)) for name, module in params["layers"].items()
    }
    return {**params, "layers": layers}


def scheme_of(name: str, scheme: str) -> str:
    """Return the scheme of one of a layer's modules; a router's choices would change, and it is small."""
    return "none" if name == "router" else scheme


def quantize_module(module: Params, scheme: str) -> Params:
    """Quantize one module's kernel; a module without a kernel is returned unchanged."""
    if scheme == "none" or "kernel" not in module:
        return module
    rest = {name: leaf for name, leaf in module.items() if name != "kernel"}
    return rest | dict(zip(SCHEMES[scheme].leaves, SCHEMES[scheme].quantize(module["kernel"]), strict=True))


def matrix_shape(module: Params) -> tuple[int, ...] | None:
    """Return the shape ``[..., in, out]`` of a linear layer's plain matrix; None for other modules."""
    if "kernel" in module:
        return module["kernel"].shape
    for scheme in SCHEMES.values():
        if scheme.leaves[0] in module:
            *layers, stored, width = module[scheme.leaves[0]].shape
            return (*layers, stored * scheme.packing, width)
    return None


def dequantize_module(module: Params, dtype: Any) -> jax.Array:
    """Return the plain matrix ``[in, out]`` of one linear layer, quantized or not."""
    for scheme in SCHEMES.values():
        if scheme.leaves[0] in module:
            matrix, scale = scheme.unpack(jnp.float32, *(module[name] for name in scheme.leaves))
            return (matrix if scale is None else matrix * scale[None, :]).astype(dtype)
    return module["kernel"].astype(dtype)
