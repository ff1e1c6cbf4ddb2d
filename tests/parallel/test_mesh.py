"""The mesh and its rules, on eight fake devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from empg_jax.parallel.mesh import (
    AXES,
    RULES,
    Blocks,
    make_mesh,
    mesh_axes,
    named_sharding,
    replicated,
    row_sharding,
    token_sharding,
    tree_shardings,
)


def test_axes_and_devices():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert mesh.axis_names == AXES == ("data", "fsdp", "tensor", "sequence")
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
    assert list(mesh.devices.flat) == jax.devices()[:8]
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert make_mesh().size == 1


def test_too_few_devices_are_refused():
    with pytest.raises(
        ValueError, match=r"data=2 x fsdp=8 x tensor=1 x sequence=1 needs 16 devices, but there are only 8"
    ):
        make_mesh(data=2, fsdp=8)


def test_every_rule_names_a_mesh_axis():
    assert {name for axes in RULES.values() for name in mesh_axes(axes)} == set(AXES)


WHERE = ("fsdp", "sequence")  # what weights are stored over


@pytest.mark.parametrize(
    "axes, shape, expected",
    [
        (("embed", "mlp"), (8, 6), (WHERE, "tensor")),
        (("layers", "heads", "embed"), (3, 4, 8), (None, "tensor", WHERE)),
        (("vocab", "embed"), (31, 8), (None, WHERE)),  # 31 is not even: replicated along that axis
        (("embed", "mlp"), (6, 7), ("fsdp", None)),  # 6 is no multiple of 4: over the first axis only
        (("embed", "mlp"), (5, 6), (None, "tensor")),
        ((None,), (8,), (None,)),
        (("embed", Blocks("kv_heads", 4)), (8, 8), (WHERE, "tensor")),  # two heads of 4
        (("embed", Blocks("kv_heads", 8)), (8, 8), (WHERE, None)),  # one head of 8 is not cut
    ],
)
def test_logical_axes_become_mesh_axes(axes, shape, expected):
    mesh = make_mesh(fsdp=2, tensor=2, sequence=2)
    sharding = named_sharding(mesh, axes, shape)
    assert sharding.spec == PartitionSpec(*expected)
    sizes = {WHERE: 4, "fsdp": 2, "tensor": 2, None: 1}
    shard = jax.device_put(jnp.zeros(shape), sharding).addressable_shards[0].data.shape
    assert shard == tuple(size // sizes[name] for size, name in zip(shape, expected, strict=True))


def test_trees_of_shapes():
    mesh = make_mesh(fsdp=4, tensor=2)
    tree = {"a": jax.ShapeDtypeStruct((8, 2), jnp.float32), "b": {"c": jnp.zeros(4)}}
    shardings = tree_shardings(mesh, {"a": ("embed", "mlp"), "b": {"c": (None,)}}, tree)
    assert shardings["a"].spec == PartitionSpec(WHERE, "tensor")
    assert shardings["b"]["c"].spec == PartitionSpec(None)


def test_rows_go_over_data_and_fsdp_together_and_time_over_sequence():
    mesh = make_mesh(data=2, fsdp=4)
    rows = jax.device_put(jnp.arange(16).reshape(8, 2), row_sharding(mesh))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(1, 2)}
    tokens = jax.device_put(jnp.zeros((8, 4)), token_sharding(make_mesh(data=2, fsdp=2, sequence=2)))
    assert {shard.data.shape for shard in tokens.addressable_shards} == {(2, 2)}
    whole = jax.device_put(jnp.arange(16), replicated(mesh))
    assert whole.is_fully_replicated and len(whole.addressable_shards) == 8
