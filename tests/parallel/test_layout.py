"""Activations on a mesh: lookups, attention and the head compute what one device computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from empg_jax.models.attention import packed_attention, sliced_attention
from empg_jax.models.filtering import TokenFilter
from empg_jax.models.head import compute_head
from empg_jax.parallel.layout import (
    constrain,
    current_mesh,
    embed_tokens,
    gather_weight,
    head_shards,
    num_shards,
    on_mesh,
    split_attention,
)
from empg_jax.parallel.mesh import make_mesh

MESHES = {
    "tensor4_sequence2": dict(tensor=4, sequence=2),
    "fsdp2_tensor2_sequence2": dict(fsdp=2, tensor=2, sequence=2),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_same_on_mesh(mesh, function, *inputs, atol=2e-5):
    """Values and gradients (with respect to every floating input) with and without the mesh."""
    where = tuple(i for i, x in enumerate(inputs) if x.dtype == np.float32)

    def loss(*inputs):
        outputs = jax.tree.leaves(function(*inputs))
        return sum(
            jnp.sum(jnp.sin(x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape))) for x in outputs
        ), outputs

    slopes = jax.value_and_grad(loss, where, has_aux=True)
    expected = jax.jit(slopes)(*inputs)
    found = jax.jit(on_mesh(mesh, slopes))(*jax.device_put(inputs, NamedSharding(mesh, PartitionSpec())))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol, rtol=1e-5), found, expected)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("vocab, depth", [(12, 8), (13, 7)])
def test_lookup(mesh, vocab, depth):
    tokens = np.random.default_rng(0).integers(0, vocab, (4, 6)).astype(np.int32)
    lookup = functools.partial(embed_tokens, dtype=jnp.float32)
    assert_same_on_mesh(make_mesh(**MESHES[mesh]), lookup, normal(vocab, depth), tokens)


@pytest.mark.parametrize("mesh", [None, *MESHES])
def test_the_gradient_of_a_narrow_table_is_added_up_in_float32(mesh):
    """Most tokens of a text are a few words: sums in bfloat16 would stop at 256 of them."""
    tokens = np.where(np.arange(4096) % 4, 3, np.arange(4096) % 12).reshape(4, 1024).astype(np.int32)

    def loss(table, tokens):
        return jnp.sum(embed_tokens(table, tokens, jnp.bfloat16).astype(jnp.float32))

    devices = make_mesh(**MESHES.get(mesh, {}))
    inputs = jax.device_put(
        (jnp.zeros((12, 8), jnp.bfloat16), tokens), NamedSharding(devices, PartitionSpec())
    )
    slope = jax.jit(on_mesh(devices, jax.grad(loss)))(*inputs)
    assert slope.dtype == jnp.bfloat16
    counts = np.bincount(tokens.ravel(), minlength=12)[:, None] * np.ones(8)
    np.testing.assert_allclose(slope.astype(np.float32), counts, rtol=2**-8)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (8, 2), (3, 1), (6, 3)])
def test_attention(mesh, heads, kv_heads):
    segment_ids = np.repeat([[1, 1, 1, 2, 2, 2, 2, 0]], 4, axis=0).astype(np.int32)
    attend = functools.partial(split_attention, packed_attention, sliced_attention)
    inputs = normal(4, 8, heads, 4), normal(4, 8, kv_heads, 4, seed=1), normal(4, 8, kv_heads, 4, seed=2)
    assert_same_on_mesh(make_mesh(**MESHES[mesh]), attend, *inputs, segment_ids)


def test_attention_of_slices_in_blocks(monkeypatch):
    """Two blocks of a slice, the last of them not full, one after another."""
    monkeypatch.setattr("empg_jax.models.attention.sliced.BLOCK", 3)
    segment_ids = np.repeat([[1, 1, 1, 2, 2, 2, 2, 0]], 4, axis=0).astype(np.int32)
    attend = functools.partial(split_attention, packed_attention, sliced_attention)
    inputs = normal(4, 8, 3, 4), normal(4, 8, 1, 4, seed=1), normal(4, 8, 1, 4, seed=2)
    mesh = make_mesh(fsdp=2, sequence=2)
    assert_same_on_mesh(mesh, attend, *inputs, segment_ids)
    assert "while" in jax.jit(on_mesh(mesh, attend)).lower(*inputs, segment_ids).as_text()


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("vocab, slab", [(48, 16), (46, 16)])
def test_head(mesh, vocab, slab):
    tokens = np.random.default_rng(0).integers(0, vocab, (4, 8)).astype(np.int32)
    head = functools.partial(compute_head, temperature=0.7, slab=slab)
    assert_same_on_mesh(make_mesh(**MESHES[mesh]), head, normal(4, 8, 8), normal(vocab, 8, seed=1), tokens)


def test_head_with_a_filter():
    mesh = make_mesh(**MESHES["fsdp2_tensor2_sequence2"])
    tokens = np.random.default_rng(0).integers(0, 48, (4, 8)).astype(np.int32)
    head = functools.partial(compute_head, temperature=0.7, slab=16, token_filter=TokenFilter(0.8, 9, 0.05))
    assert_same_on_mesh(mesh, head, normal(4, 8, 8), normal(48, 8, seed=1), tokens)


def test_gathered_weights_have_split_gradients():
    mesh = make_mesh(fsdp=4, tensor=2)
    weight, axes = normal(8, 6), ("embed", "mlp")

    def program(weight):
        whole = gather_weight(weight, axes)
        jax.debug.inspect_array_sharding(whole, callback=lambda s: seen.append(s.shard_shape((8, 6))))
        return jnp.sum(whole**2)

    seen = []
    sharding = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    slope = jax.jit(on_mesh(mesh, jax.grad(program)))(jax.device_put(weight, sharding))
    np.testing.assert_allclose(slope, 2 * weight, rtol=1e-6)
    assert seen == [(8, 3)]
    assert {shard.data.shape for shard in slope.addressable_shards} == {(2, 3)}


def test_without_a_mesh_nothing_happens():
    x = jnp.ones((4, 4))
    assert current_mesh() is None and num_shards("rows") == 1
    assert constrain(x, "rows", "time") is x
    assert on_mesh(make_mesh(), test_head) is test_head


def test_shards_are_counted_inside_a_mesh():
    counted = []
    program = on_mesh(
        make_mesh(data=2, fsdp=2, sequence=2),
        lambda: counted.extend(map(num_shards, ("rows", "time", "vocab"))),
    )
    program()
    assert counted == [4, 2, 1]


def test_heads_are_split_where_they_can_be_divided():
    assert head_shards({"tensor": 2, "sequence": 2}, 12) == (2, 2)
    assert head_shards({"tensor": 8, "sequence": 1}, 12) == (1, 1)
    assert head_shards({"tensor": 2, "sequence": 4}, 12) == (2, 1)
    assert head_shards({"tensor": 5, "sequence": 4}, 12) == (1, 4)
