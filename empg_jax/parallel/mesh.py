"""The device mesh and the rules that map logical axes to it.

Parameters have logical axis names (`models.decoder.param_axes`). `RULES` gives the mesh axis that splits each
of them. Batch rows are split over ``data`` and ``fsdp`` together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor", "sequence")


class Blocks(NamedTuple):
    """A logical axis of blocks of ``size`` numbers (attention heads). It is only split between blocks."""

    axis: str
    size: int


Axis = str | Blocks | None  # a logical axis
MeshAxes = str | tuple[str, ...] | None

# Logical axis of a parameter -> mesh axis. None: replicated.
RULES: dict[str | None, MeshAxes] = {
    "vocab": "tensor",
    "embed": ("fsdp", "sequence"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "tensor",
    "slots": "data",
    "layers": None,
    None: None,
}

ROWS = PartitionSpec(("data", "fsdp"))


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Make a mesh from the first ``data * fsdp * tensor * sequence`` devices.

    Args:
      data: size of the axis of data parallelism.
      fsdp: size of the axis that splits rows and weights; with ``data`` > 1, weights are copied over ``data``
        and split inside (hybrid sharding).
      tensor: size of the axis that splits heads, MLP, experts and vocabulary.
      sequence: size of the axis that splits time, and weights.
      devices: the devices to choose from; default ``jax.devices()``, the devices of all hosts.

    Raises:
      ValueError: the mesh needs more devices than there are.
    """
    shape = (data, fsdp, tensor, sequence)
    needed = int(np.prod(shape))
    devices = jax.devices() if devices is None else devices
    if needed > len(devices):
        asked = " x ".join(f"{name}={size}" for name, size in zip(AXES, shape, strict=True))
        raise ValueError(
            f"mesh {asked} needs {needed} devices, but there are only {len(devices)} ({devices[0].platform})"
        )
    grid = np.asarray(devices[:needed]).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def fit_spec(
    mesh: Mesh | AbstractMesh,
    axes: Sequence[Axis],
    shape: Sequence[int],
    rules: Mapping[str | None, MeshAxes] = RULES,
) -> PartitionSpec:
    """Return how an array is split by its logical axes.

    The number of devices must divide a dimension's size, or its number of `Blocks`. Where it does not, the
    last mesh axes of the rule are left out; without any, the dimension is replicated.
    """

    def fit(axis: Axis, size: int) -> MeshAxes:
        name, block = axis if isinstance(axis, Blocks) else (axis, 1)
        names, count = mesh_axes(rules[name]), size // block
        while names and (not count or count % math.prod(mesh.shape[name] for name in names)):
            names = names[:-1]
        return names[0] if len(names) == 1 else names or None

    return PartitionSpec(*map(fit, axes, shape))


def mesh_axes(entry: MeshAxes) -> tuple[str, ...]:
    """Return the mesh axes that an entry of a rule or of a `PartitionSpec` names."""
    return (entry,) if isinstance(entry, str) else entry or ()


def named_sharding(mesh: Mesh, axes: tuple[Axis, ...], shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of one array by its logical axes (see `fit_spec`)."""
    return NamedSharding(mesh, fit_spec(mesh, axes, shape))


def tree_shardings(mesh: Mesh, axes: Any, tree: Any) -> Any:
    """Return the shardings of a tree of arrays or shapes, given the tree of their logical axes."""
    return jax.tree.map(
        lambda leaf, names: named_sharding(mesh, names, leaf.shape),
        tree,
        axes,
        is_leaf=lambda node: hasattr(node, "shape"),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array whose first axis is batch rows."""
    return NamedSharding(mesh, ROWS)


def token_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array ``[rows, time]``."""
    return NamedSharding(mesh, PartitionSpec(*ROWS, "sequence"))
