"""The memory of a learner's activations, by formulas: what all layers keep, and what one layer needs."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from empg_jax.learner.batching import BatchShape
from empg_jax.models.attention.tiles import FEW_TILES, tile_size
from empg_jax.models.decoder import DecoderConfig
from empg_jax.parallel.layout import head_shards


@dataclasses.dataclass(frozen=True)
class Widths:
    """Numbers per token on one device."""

    stream: int
    queries: int
    keys: int  # as many values as keys exist besides
    hidden: int
    routed: int  # copies of the residual stream that are the experts' inputs and outputs
    heads: int


def find_widths(model: DecoderConfig, mesh: AbstractMesh) -> Widths:
    """Find the widths of a decoder whose mesh splits them."""
    tensor, moe = mesh.shape["tensor"], model.moe
    q_parts = tensor if model.num_heads % tensor == 0 else 1
    k_parts = tensor if model.num_kv_heads % tensor == 0 else 1
    return Widths(
        stream=model.hidden_size,
        queries=model.num_heads * model.head_dim // q_parts,
        keys=model.num_kv_heads * model.head_dim // k_parts,
        # A device has one row for each of a token's experts, even for experts of other devices.
        hidden=-(-model.intermediate_size // tensor) if moe is None else moe.top_k * moe.expert_size,
        routed=0 if moe is None else 2 * moe.top_k * model.hidden_size,
        heads=model.num_heads // q_parts,
    )


def activation_bytes(model: DecoderConfig, mesh: AbstractMesh, shape: BatchShape) -> tuple[int, int]:
    """Compute the bytes of activations on one device.

    Args:
      model: the decoder's config; ``remat`` decides which activations are kept. Without ``scan_layers`` the
        compiler keeps all of them.
      mesh: sizes of the mesh's axes.
      shape: the sizes of a micro-batch.

    Returns:
      Bytes that all layers keep for the backward pass, and bytes in use while one layer runs.
    """
    w, wide, tokens = find_widths(model, mesh), 4, tokens_here(mesh, shape)
    narrow = jnp.dtype(model.dtype).itemsize
    full = narrow * (w.stream + w.queries) + wide * w.heads
    dots = full + narrow * (w.stream + w.queries + 2 * w.keys + 2 * w.hidden)
    # The norms and rotations in float32, the norms' results, and the arrays between gate and down.
    between = 2 * w.stream + 3 * w.hidden + 2 * w.routed
    everything = dots + wide * (5 * w.stream + w.queries + w.keys) + narrow * between
    kept = {"full": full, "dots": dots, "none": everything}[model.remat if model.scan_layers else "none"]
    # A layer's gradient needs all arrays of its forward pass, and the gradients of its widest part.
    slopes = wide * 2 * w.stream + narrow * 3 * w.hidden
    attention = _score_bytes(model, mesh, shape)
    return tokens * kept * model.num_layers, tokens * (everything + slopes) + attention


def tokens_here(mesh: AbstractMesh, shape: BatchShape) -> int:
    """Compute the tokens of a micro-batch on one device."""
    return _rows_here(mesh, shape) * shape.row_tokens // mesh.shape["sequence"]


def _rows_here(mesh: AbstractMesh, shape: BatchShape) -> int:
    return -(-shape.micro_rows // (mesh.shape["data"] * mesh.shape["fsdp"]))


def _score_bytes(model: DecoderConfig, mesh: AbstractMesh, shape: BatchShape) -> int:
    """Compute the bytes of a tile's three float32 tables, and of sums as long as the row (`tiles`)."""
    heads = model.num_heads // math.prod(head_shards(mesh.shape, model.num_heads))
    row = shape.row_tokens
    sums = 2 * 4 * row * model.head_dim  # of the keys' and values' gradients
    return _rows_here(mesh, shape) * heads * (3 * 4 * tile_size(row, FEW_TILES) ** 2 + sums)
