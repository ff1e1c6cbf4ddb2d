"""Packed attention: the interface, the choice of a back end, and the custom derivative around all back ends.

A back end is a pair of functions::

    forward(queries, keys, values, segment_ids) -> (output, normalizer)
    backward(queries, keys, values, segment_ids, output, normalizer, slope) -> (d_queries, d_keys, d_values)

``normalizer [B H T]`` is the logarithm of the softmax's denominator. Beyond inputs and output it is the only
residual that a backward pass needs, and every back end computes the same number. The custom derivative can
therefore stand outside of the choice by platform. This has three effects: a program has one set of residuals,
rematerialization can keep them by name, and a module exported for several platforms holds the kernel of each.

cuDNN's fused attention is not used. Through ``jax.nn.dot_product_attention`` it supports padding but no
segments, so packed rows would need a ``[B, 1, T, T]`` mask in memory. On an H100 its causal kernel without
segments is faster than the Triton kernel (``scripts/README.md``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from empg_jax.models.attention import tiles
from empg_jax.models.attention.dispatch import by_platform, load_late
from empg_jax.models.attention.operands import Operands

# Checkpoint name of attention's residuals (output and normalizer); `jax.checkpoint` policies keep them by it.
SAVED = "attention"
BACKENDS = ("auto", "xla")


def packed_attention(
    queries: Float[Array, "B T H d"],
    keys: Float[Array, "B T K d"],
    values: Float[Array, "B T K d"],
    segment_ids: Int[Array, "B T"],
    *,
    backend: str = "auto",
    tile: int | None = None,
) -> Float[Array, "B T H d"]:
    """Compute causal attention inside each segment of packed rows.

    On several devices, call it on each device's own rows and heads (`parallel.layout.split_attention`),
    because the compiler cannot split a kernel.

    Args:
      queries: rotated queries.
      keys: rotated keys.
      values: values.
      segment_ids: packed sequence of each token; tokens attend inside their own segment only.
      backend: "auto" is the platform's fused kernel if `is_fusible` accepts the shape, else tiles. "xla" is
        tiles on every platform.
      tile: length of a tile, where tiles are used; default by the row's length (`tiles.tile_size`).

    Returns:
      The attention output, in the type of the queries.

    Raises:
      ValueError: the back end is unknown.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention back end {backend!r}: choose one of {', '.join(BACKENDS)}")
    is_fused = backend == "auto" and is_fusible(queries.shape[1], queries.shape[3], queries.dtype)
    return _packed(queries, keys, values, segment_ids, is_fused, tile)


def is_fusible(length: int, head_dim: int, dtype: jnp.dtype) -> bool:
    """Return whether the GPU and TPU kernels support this row length, head size and type.

    A row shorter than one kernel block is faster as a tile. The kernels would pad heads of another size.
    """
    return length >= 128 and head_dim in (64, 128, 256) and dtype in (jnp.float32, jnp.bfloat16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _packed(
    queries: Array, keys: Array, values: Array, segment_ids: Array, is_fused: bool, tile: int | None
) -> Array:
    return _forward(queries, keys, values, segment_ids, is_fused, tile)[0]


def _forward(
    queries: Array, keys: Array, values: Array, segment_ids: Array, is_fused: bool, tile: int | None
) -> tuple[Array, tuple[Array, ...]]:
    inputs = queries, keys, values, segment_ids
    forward = _fused_forward if is_fused else tiles.forward
    # With a name, a rematerialization policy can keep these two and skip attention's whole forward pass.
    output, normalizer = (checkpoint_name(x, SAVED) for x in forward(*inputs, tile=tile))
    return output, (*inputs, output, normalizer)


def _backward(
    is_fused: bool, tile: int | None, residuals: tuple[Array, ...], slope: Array
) -> tuple[Array, Array, Array, None]:
    backward: Callable[..., tuple[Array, ...]] = _fused_backward if is_fused else _from_arrays(tiles.backward)
    d_queries, d_keys, d_values = backward(*residuals, slope, tile=tile)
    return d_queries, d_keys, d_values, None


def _from_arrays(backward: Callable[..., tuple[Array, ...]]) -> Callable[..., tuple[Array, ...]]:
    """Return the backward pass as a function of seven arrays, because a primitive takes no tuples."""

    def run(*arrays: Array, **options: int | None) -> tuple[Array, ...]:
        return backward(Operands(*arrays[:4]), *arrays[4:], **options)

    return run


_packed.defvjp(_forward, _backward)

_TRITON, _SPLASH = (f"empg_jax.models.attention.{name}" for name in ("triton", "splash"))
_fused_forward = by_platform(
    "attention", tiles.forward, cuda=load_late(_TRITON, "forward"), tpu=load_late(_SPLASH, "forward")
)
_fused_backward = by_platform(
    "attention_backward",
    _from_arrays(tiles.backward),
    cuda=_from_arrays(load_late(_TRITON, "backward")),
    tpu=_from_arrays(load_late(_SPLASH, "backward")),
)
