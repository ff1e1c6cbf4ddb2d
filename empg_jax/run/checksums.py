"""Checksums of arrays on the host: a checkpoint holds one for each leaf, and a restore compares them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def checksums(tree: Any) -> dict[str, int]:
    """Compute the CRC-32 of every array's bytes, by the leaf's path; those split over hosts are left out."""
    return {name: crc_of(np.asarray(leaf)) for name, leaf in _local_leaves(tree)}


def crc_of(values: np.ndarray | str) -> int:
    """Compute the CRC-32 of an array's bytes, or of a text in UTF-8."""
    if isinstance(values, str):
        return zlib.crc32(values.encode())
    # Types such as bfloat16 offer no buffer of their own; their bytes do.
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def nonfinite_leaf(tree: Any) -> str | None:
    """Return the path of the first array with a NaN or an infinity, or None."""
    for name, leaf in _local_leaves(tree):
        values = np.asarray(leaf)
        if jax.numpy.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            return name
    return None


def describe_damage(tree: Any, saved: Mapping[str, int]) -> str | None:
    """Return the path of the first array whose checksum is not the saved one, or None."""
    found = checksums(tree)
    return next((name for name in found if saved.get(name, found[name]) != found[name]), None)


def _local_leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    local = [(path, leaf) for path, leaf in leaves if _is_here(leaf)]
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in local]


def _is_here(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated
