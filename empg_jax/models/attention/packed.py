"""Packed attention: the interface, the rule that selects a back end, and the one backward pass around them.

A back end is a pair of functions::

    forward(queries, keys, values, segment_ids) -> (output, normalizer)
    backward(queries, keys, values, segment_ids, output, normalizer, slope) -> (d_queries, d_keys, d_values)

``normalizer [B H T]`` is the logarithm of the soft-max's denominator: all that a backward pass needs beyond
inputs and output, and the same number in every back end. The custom derivative therefore stands outside of
the choice by platform. A program carries one set of residuals, rematerialization can keep them by name, and
a module exported for several platforms holds each platform's own kernel.

Not used: cuDNN's fused attention. Through ``jax.nn.dot_product_attention`` it knows padding but no segments;
packed rows would need a ``[B, 1, T, T]`` mask in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from empg_jax.models.attention import splash, tiles, triton
from empg_jax.models.attention.dispatch import by_platform
from empg_jax.models.attention.operands import Operands

# Checkpoint name of what the backward pass of attention needs besides queries, keys and values.
SAVED = "attention"
BACKENDS = ("auto", "xla")


def packed_attention(
    queries: Float[Array, "B T H d"],
    keys: Float[Array, "B T K d"],
    values: Float[Array, "B T K d"],
    segment_ids: Int[Array, "B T"],
    *,
    backend: str = "auto",
    block: int = 64,
) -> Float[Array, "B T H d"]:
    """Causal attention inside each segment of packed rows.

    On several devices, call it on each device's own rows and heads (`parallel.layout.split_attention`): the
    compiler cannot split a kernel by itself.

    Args:
      queries: rotated queries.
      keys: rotated keys.
      values: values.
      segment_ids: packed sequence of each token; tokens attend inside their own segment only.
      backend: "auto": the platform's fused kernel where the shape is one of `is_fusible`, else tiles;
        "xla": tiles on every platform.
      block: query block length of the tiles; at most 16 blocks are made, longer rows get larger blocks.

    Returns:
      The attention output, in the type of the queries.

    Raises:
      ValueError: the back end has no such name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention back end {backend!r}: choose one of {', '.join(BACKENDS)}")
    is_fused = backend == "auto" and is_fusible(queries.shape[1], queries.shape[3], queries.dtype)
    return _packed(queries, keys, values, segment_ids, is_fused, block)


def is_fusible(length: int, head_dim: int, dtype: jnp.dtype) -> bool:
    """Whether the GPU and TPU kernels take rows of this length, heads of this size and this type.

    A row shorter than one kernel block is better off as a tile; heads of another size would be padded.
    """
    return length >= 128 and head_dim in (64, 128, 256) and dtype in (jnp.float32, jnp.bfloat16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _packed(
    queries: Array, keys: Array, values: Array, segment_ids: Array, is_fused: bool, block: int
) -> Array:
    return _forward(queries, keys, values, segment_ids, is_fused, block)[0]


def _forward(
    queries: Array, keys: Array, values: Array, segment_ids: Array, is_fused: bool, block: int
) -> tuple[Array, tuple[Array, ...]]:
    inputs = queries, keys, values, segment_ids
    forward = _fused_forward if is_fused else tiles.forward
    # Named, so that rematerialization may keep these two and skip the whole forward pass.
    output, normalizer = (checkpoint_name(x, SAVED) for x in forward(*inputs, block=block))
    return output, (*inputs, output, normalizer)


def _backward(
    is_fused: bool, block: int, residuals: tuple[Array, ...], slope: Array
) -> tuple[Array, Array, Array, None]:
    backward: Callable[..., tuple[Array, ...]] = _fused_backward if is_fused else _from_arrays(tiles.backward)
    d_queries, d_keys, d_values = backward(*residuals, slope, block=block)
    return d_queries, d_keys, d_values, None


def _from_arrays(backward: Callable[..., tuple[Array, ...]]) -> Callable[..., tuple[Array, ...]]:
    """The backward pass as a function of seven arrays: a primitive takes no other."""

    def run(*arrays: Array, **options: int) -> tuple[Array, ...]:
        return backward(Operands(*arrays[:4]), *arrays[4:], **options)

    return run


_packed.defvjp(_forward, _backward)

_fused_forward = by_platform("attention", tiles.forward, cuda=triton.forward, tpu=splash.forward)
_fused_backward = by_platform(
    "attention_backward",
    _from_arrays(tiles.backward),
    cuda=_from_arrays(triton.backward),
    tpu=_from_arrays(splash.backward),
)
