"""Arrays that several hosts share: to the devices, back to every host, and from the learner to one host.

All hosts call these functions together, with the same values. On one host they are plain copies.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from empg_jax.parallel.mesh import replicated


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


def to_local(tree: Any, shardings: Any) -> Any:
    """Copy arrays of the learner's mesh to a mesh of this host, one array at a time.

    Args:
      tree: arrays on any devices.
      shardings: where each goes on this host.
    """
    if all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(tree)):
        return jax.device_put(tree, shardings)

    def move(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        # Waited for: else the gathered copies of all arrays would be there at the same time.
        return jax.block_until_ready(jax.device_put(_whole(leaf).addressable_data(0), sharding))

    return jax.tree.map(move, tree, shardings)


def _whole(leaf: Any) -> Any:
    """Gather an array to every device of its mesh, if this host does not have all of it."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    assert isinstance(leaf.sharding, NamedSharding)
    return _gather(leaf.sharding.mesh)(leaf)


@functools.cache
def _gather(mesh: Mesh) -> Any:
    return jax.jit(lambda leaf: leaf, out_shardings=replicated(mesh))
