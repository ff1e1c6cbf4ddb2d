"""Arrays that several hosts share: to the devices, back to every host, and from the learner in pieces.

All hosts call these functions together, with the same values. On one host they are plain copies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from empg_jax.parallel.mesh import replicated
from empg_jax.parallel.order import jit_on_mesh
from empg_jax.types import Params


def put(tree: Any, shardings: Any) -> Any:
    """Copy host arrays, equal on all hosts, to the devices; each host sends its own devices' parts only."""
    if all(sharding.is_fully_addressable for sharding in jax.tree.leaves(shardings)):
        return jax.device_put(tree, shardings)

    def place(values: Any, sharding: NamedSharding) -> jax.Array:
        whole = np.asarray(values)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, tree, shardings)


def fetch(tree: Any) -> Any:
    """Copy arrays whole to every host, wherever their parts are."""
    return jax.device_get(jax.tree.map(_whole, tree))


def is_here(tree: Any) -> bool:
    """Return whether this host's devices hold all parts of all arrays."""
    return all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(tree))


def move_in_pieces(params: Params, place: Callable[[Params], Params]) -> Params:
    """Copy stacked parameters piece by piece.

    A piece is one array outside of the layers, or a single layer, whose arrays keep their first axis, of
    size 1. Of parameters that are split over hosts, each device of the mesh then holds the piece whole. The
    arrays outside of the layers may be larger than a layer and come first, while little is placed.

    Args:
      params: stacked parameters, on any devices.
      place: copies a piece to where it stays; of a layer it returns a tuple.

    Returns:
      What was placed, as one tree with ``layers`` as a tuple.
    """
    placed: Params = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path({**params, "layers": {}}):
        (first, *inner) = [entry.key for entry in path]
        # Every piece is freed when `place` returns: none has a name here.
        part = place({first: _nest(inner, _bring(leaf))})
        placed[first] = placed.get(first, {}) | part[first]
    layers: list[Params] = []
    stacked = {"layers": jax.tree.map(jnp.asarray, params["layers"])}  # of NumPy's, not one copy per layer
    first_leaf = jax.tree.leaves(stacked)[0]
    take = take_layer(None if is_here(stacked) else first_leaf.sharding.mesh)
    for number in range(len(first_leaf)):
        layers += place(jax.tree.map(_bring, take(stacked, np.int32(number))))["layers"]
    return placed | {"layers": tuple(layers)}


def _nest(names: list[str], leaf: Any) -> Any:
    return functools.reduce(lambda inner, name: {name: inner}, reversed(names), leaf)


@functools.cache
def take_layer(mesh: Mesh | None) -> Any:
    """Compile the program that takes one of the stacked layers, and gathers it to every device of a mesh."""

    def take(stacked: Params, number: jax.Array) -> Params:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, number, 1), stacked)

    return jax.jit(take) if mesh is None else jit_on_mesh(mesh, take, out_shardings=replicated(mesh))


def _bring(leaf: Any) -> Any:
    """Return an array that is here; of one that hosts share, the whole of it on this host's first device."""
    return leaf if is_here(leaf) else jax.block_until_ready(_whole(leaf).addressable_data(0))


def _whole(leaf: Any) -> Any:
    """Gather an array to every device of its mesh, if this host does not have all of it."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    assert isinstance(leaf.sharding, NamedSharding)
    return _gather(leaf.sharding.mesh)(leaf)


@functools.cache
def _gather(mesh: Mesh) -> Any:
    return jit_on_mesh(mesh, lambda leaf: leaf, out_shardings=replicated(mesh))
