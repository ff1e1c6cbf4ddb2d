"""Fingerprints of weights: the log-probability of a fixed text, and a checksum of all bits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from empg_jax.learner.outputs import compute_logprobs
from empg_jax.models.decoder import DecoderConfig
from empg_jax.models.lora import combine
from empg_jax.parallel.mesh import replicated
from empg_jax.parallel.order import jit_on_mesh
from empg_jax.types import Params

TEXT = (
    "The quick brown fox jumps over the lazy dog. def add(a, b): return a + b  # 2 + 3 = 5\n1, 1, 2, 3, 5, 8"
)
LENGTH = 64  # most tokens of the text


def text_logprob(
    params: Params, model: DecoderConfig, ids: Sequence[int], mesh: Mesh, base: Params | None = None
) -> float:
    """Compute the mean log-probability (nats per token) of a text's tokens after the first.

    The number changes when weights are loaded wrongly or another tokenizer is used.

    Args:
      params: the trained parameters, on the mesh.
      model: decoder config.
      ids: the text's tokens (those of `TEXT`); tokens after the first `LENGTH` are ignored.
      mesh: the mesh.
      base: the frozen parameters below adapters.
    """
    count = min(len(ids), LENGTH)
    # One copy of the text per row device: the rows must divide over data x fsdp.
    sequence = mesh.shape["sequence"]
    length = -(-LENGTH // sequence) * sequence
    tokens = np.zeros((mesh.shape["data"] * mesh.shape["fsdp"], length), np.int32)
    tokens[:, :count] = ids[:count]
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    segments = (positions < count).astype(np.int32)

    def run(params: Params, base: Params, rows: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return compute_logprobs(combine(base, params), model, *rows)[0][0]

    program = jit_on_mesh(mesh, run, out_shardings=replicated(mesh))
    logprobs = program(params, base or {}, (tokens, positions, segments))
    return float(np.asarray(logprobs)[1:count].mean())


def policy_checksum(params: Params) -> str:
    """Hash the parameters as `checksum` does, a critic's head aside: it starts at 0, and samples nothing."""
    return checksum({name: part for name, part in params.items() if name != "value_head"})


def checksum(params: Params) -> str:
    """Hash the names, types, shapes and every bit of the parameters, on any devices.

    Sums of integers are exact, so the hash does not depend on the sharding of the arrays.
    """
    sums = jax.device_get(jax.jit(lambda tree: jax.tree.map(_sum_bits, tree))(params))
    digest = hashlib.sha256()
    shapes = dict(jax.tree_util.tree_leaves_with_path(params))
    for path, total in jax.tree_util.tree_leaves_with_path(sums):
        leaf = shapes[path]
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {total}\n".encode())
    return digest.hexdigest()[:16]


def _sum_bits(leaf: jax.Array) -> jax.Array:
    """Sum bits x (an odd number that depends on the place), modulo 2^32."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    # The weights of the sum differ by place, so that two exchanged elements change it.
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    place, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[axis]
    return jnp.sum(bits * (place * jnp.uint32(2 * 2654435761 % 2**32) + jnp.uint32(1)), dtype=jnp.uint32)
