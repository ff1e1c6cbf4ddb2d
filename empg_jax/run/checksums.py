"""Checksums of arrays: a checkpoint holds one for each leaf, and a restore compares them.

An array's checksum is a sum over its elements, each times a weight that depends on its place in the whole
array. So each host sums the part that it holds, and the parts add up to the same number however the array is
split: a checkpoint of two hosts is checked by one, by four, or on another mesh.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from empg_jax.parallel.hosts import ALONE, Hosts

# The weights are odd, so that the change of one element always changes the sum, modulo 2^64.
_STEP = np.uint64(2 * 0x9E3779B97F4A7C15 % 2**64)
_MODULUS = 2**64


def checksums(tree: Any, hosts: Hosts = ALONE) -> dict[str, int]:
    """Compute the checksum of every array, by the leaf's path.

    Args:
      tree: arrays in the host's memory or on devices.
      hosts: all call this together, where a leaf is split over them.
    """
    leaves = _named_leaves(tree)
    sums = {name: _sum_here(leaf) for name, leaf in leaves}
    parts = {name: sums[name] for name, leaf in leaves if is_split(leaf)}
    if parts:
        every = hosts.agree("checksums", parts)
        sums |= {name: sum(each[name] for each in every) % _MODULUS for name in parts}
    return sums


def crc_of(text: str) -> int:
    """Compute the CRC-32 of a text in UTF-8."""
    return zlib.crc32(text.encode())


def nonfinite_leaf(tree: Any) -> str | None:
    """Return the path of the first array with a NaN or an infinity in what this host holds, or None."""
    for name, leaf in _named_leaves(tree):
        for _, values in _parts(leaf):
            if jax.numpy.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
                return name
    return None


def describe_damage(tree: Any, saved: Mapping[str, int], hosts: Hosts = ALONE) -> str | None:
    """Return the path of the first array whose checksum is not the saved one, or None (as `checksums`)."""
    found = checksums(tree, hosts)
    return next((name for name in found if saved.get(name, found[name]) != found[name]), None)


def is_split(leaf: Any) -> bool:
    """Return whether no host holds the whole array."""
    return isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _parts(leaf: Any) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield start and values of the parts of an array that this host answers for, each once."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_replicated:
        yield [0] * np.ndim(leaf), np.asarray(leaf)
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:  # copies of a part may lie on other devices, also of other hosts
            yield [piece.start or 0 for piece in shard.index], np.asarray(shard.data)


def _sum_here(leaf: Any) -> int:
    return sum(sum_part(values, start, np.shape(leaf)) for start, values in _parts(leaf)) % _MODULUS


def sum_part(values: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> int:
    """Sum the elements of a part of an array, each times the weight of its place in the whole array.

    Args:
      values: the part.
      start: place of its first element along each axis.
      shape: of the whole array.
    """
    if values.size == 0:
        return 0
    # Types such as bfloat16 have no sum of their own; their bits do.
    words = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
    axes = [
        np.uint64(math.prod(shape[axis + 1 :])) * np.arange(first, first + size, dtype=np.uint64)
        for axis, (first, size) in enumerate(zip(start, values.shape, strict=True))
    ] or [np.zeros(1, np.uint64)]
    # A weight is 1 + _STEP * place, and a place is that of its row plus its column: two sums suffice.
    rows = functools.reduce(np.add.outer, axes[:-1], np.zeros((), np.uint64)).reshape(-1)
    table = words.reshape(rows.size, axes[-1].size)
    by_row = np.sum(table, axis=1, dtype=np.uint64) @ (rows * _STEP + np.uint64(1))
    by_column = np.sum(table, axis=0, dtype=np.uint64) @ (axes[-1] * _STEP)
    return (int(by_row) + int(by_column)) % _MODULUS
