"""How activations lie on the mesh of the program that is being traced.

A program enters its mesh with `on_mesh`; inside, the functions here pin arrays by logical axes and split
lookups and attention over devices. Outside of any mesh they do nothing, so the same model code runs on one
device and on many.

============  =======================================================================================
rows          over ``data`` x ``fsdp``
time          over ``sequence``; for attention the axis changes places with heads (all-to-all), so every
              device sees whole rows of some heads
heads, mlp    over ``tensor``
vocabulary    over ``tensor``; log-probabilities are put together from one number per token and device
weights       kept over ``fsdp``; a layer's are gathered when it runs, and its gradient is scattered again
============  =======================================================================================
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from empg_jax.parallel.mesh import AXES, RULES, Axis, MeshAxes, fit_spec

# Logical axis of an activation -> mesh axes.
ACTIVATIONS: dict[str | None, MeshAxes] = {
    "rows": ("data", "fsdp"),
    "time": "sequence",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    None: None,
}


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, traced with the mesh as its surroundings; unchanged where there is one device."""
    if mesh.size == 1:
        return function

    @functools.wraps(function, assigned=())
    def traced(*args: Any, **options: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **options)

    return traced


def current_mesh() -> AbstractMesh | None:
    """The surrounding mesh; None outside of `on_mesh`, and inside a function that sees one device's part."""
    mesh = jax.sharding.get_abstract_mesh()
    is_ours = mesh.axis_names == AXES and all(kind == AxisType.Auto for kind in mesh.axis_types)
    return mesh if is_ours else None


def num_shards(axis: str) -> int:
    """Parts that an activation's logical axis is split into; 1 outside of a mesh."""
    mesh = current_mesh()
    names = ACTIVATIONS[axis]
    if mesh is None or names is None:
        return 1
    return math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))


def constrain(x: Array, *axes: str | None) -> Array:
    """``x``, laid out by the logical axes of its dimensions; an axis that does not divide is replicated."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, fit_spec(mesh, axes, x.shape, ACTIVATIONS))


# ------------------------------------------------------------------------------------------ weights


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_weight(weight: Array, axes: tuple[Axis, ...]) -> Array:
    """A weight put together from its ``fsdp`` shards for use now; its gradient goes back into shards.

    Args:
      weight: a parameter, in the type that is worth sending.
      axes: its logical axes (`models.decoder.param_axes`).
    """
    return _pin(weight, axes, is_whole=True)


def _gather(weight: Array, axes: tuple[Axis, ...]) -> tuple[Array, None]:
    return _pin(weight, axes, is_whole=True), None


def _scatter(axes: tuple[Axis, ...], _: None, slope: Array) -> tuple[Array]:
    return (shard_weight(slope, axes),)


gather_weight.defvjp(_gather, _scatter)


def shard_weight(weight: Array, axes: tuple[Axis, ...]) -> Array:
    """Something of a parameter's shape (a gradient), laid out as the parameter is."""
    return _pin(weight, axes, is_whole=False)


def _pin(weight: Array, axes: tuple[Axis, ...], *, is_whole: bool) -> Array:
    mesh = current_mesh()
    if mesh is None:
        return weight
    spec = fit_spec(mesh, axes, weight.shape, RULES)
    if is_whole:
        spec = PartitionSpec(*(None if name == "fsdp" else name for name in spec))
    return jax.lax.with_sharding_constraint(weight, spec)


def embed_tokens(table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
    """Rows of the embedding, in ``dtype``.

    On a mesh every device looks up the tokens of its ``fsdp`` group in its own part of the table (other
    parts' tokens give zeros), and the pieces change places: no device holds the whole table, and its
    gradient never leaves the device that owns it.
    """
    mesh = current_mesh()
    if mesh is None:
        return jnp.take(table, tokens, axis=0).astype(dtype)
    rows, time = fit_spec(mesh, ("rows", "time"), tokens.shape, ACTIVATIONS)
    vocab, depth = (
        name if name is not None and mesh.shape[name] > 1 else None
        for name in fit_spec(mesh, ("vocab", "embed"), table.shape, RULES)
    )
    if rows is None:
        depth = None  # rows that are not split have nothing to change places with

    def local(table: Array, tokens: Array) -> Array:
        if depth is not None:
            tokens = jax.lax.all_gather(tokens, depth, axis=0, tiled=True)
        if vocab is not None:
            tokens = tokens - jax.lax.axis_index(vocab) * table.shape[0]
        is_mine = jnp.logical_and(tokens >= 0, tokens < table.shape[0])
        found = jnp.take(table, jnp.where(is_mine, tokens, 0), axis=0).astype(dtype)
        found = jnp.where(is_mine[:, :, None], found, jnp.zeros((), dtype))
        if vocab is not None:
            found = jax.lax.psum(found, vocab)
        if depth is not None:
            found = jax.lax.all_to_all(found, depth, split_axis=0, concat_axis=2, tiled=True)
        return found

    return jax.shard_map(
        local,
        in_specs=(PartitionSpec(vocab, depth), PartitionSpec(rows, time)),
        out_specs=PartitionSpec(rows, time, None),
    )(table, tokens)


# ---------------------------------------------------------------------------------------- attention


def split_attention(
    attention: Callable[[Array, Array, Array, Array], Array],
    queries: Float[Array, "B T H d"],
    keys: Float[Array, "B T K d"],
    values: Float[Array, "B T K d"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T H d"]:
    """``attention(queries, keys, values, segment_ids)``, each device doing some rows and heads.

    Rows stay whole inside a device: where time is split, it changes places with the heads. Key/value heads
    fewer than the devices are repeated, so that each device has those that its query heads need.

    Args:
      attention: sees whole rows of ``H / n`` query heads and their key/value heads.
      queries: rotated queries.
      keys: rotated keys.
      values: values.
      segment_ids: packed sequence of each token.

    Raises:
      ValueError: time is split, and the heads cannot be.
    """
    mesh = current_mesh()
    if mesh is None:
        return attention(queries, keys, values, segment_ids)
    shards = head_shards(dict(mesh.shape), queries.shape[2])
    repeats = math.lcm(keys.shape[2], shards) // keys.shape[2]
    keys, values = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (keys, values))
    (rows,) = fit_spec(mesh, ("rows",), queries.shape[:1], ACTIVATIONS)
    is_time_split = mesh.shape["sequence"] > 1
    spec = PartitionSpec(rows, "sequence" if is_time_split else None, "tensor" if shards > 1 else None, None)

    def swap(x: Array, split_axis: int, concat_axis: int) -> Array:
        return jax.lax.all_to_all(x, "sequence", split_axis, concat_axis, tiled=True)

    def local(queries: Array, keys: Array, values: Array, segment_ids: Array) -> Array:
        if not is_time_split:
            return attention(queries, keys, values, segment_ids)
        q, k, v = (swap(x, split_axis=2, concat_axis=1) for x in (queries, keys, values))
        return swap(attention(q, k, v, segment_ids), split_axis=1, concat_axis=2)

    return jax.shard_map(
        local,
        in_specs=(spec, spec, spec, PartitionSpec(rows, None)),
        out_specs=spec,
        check_vma=False,  # kernels do not say how their results vary over devices
    )(queries, keys, values, segment_ids)


def head_shards(mesh_shape: dict[str, int], num_heads: int) -> int:
    """Parts that attention's heads are split into: the ``tensor`` x ``sequence`` devices, or 1.

    Args:
      mesh_shape: size of each mesh axis.
      num_heads: query heads.

    Raises:
      ValueError: ``sequence`` is larger than 1 and does not divide the heads (with ``tensor``).
    """
    tensor, sequence = mesh_shape["tensor"], mesh_shape["sequence"]
    if num_heads % (tensor * sequence) == 0:
        return tensor * sequence
    if sequence > 1:
        raise ValueError(
            f"{num_heads} heads cannot be divided over mesh.tensor={tensor} x mesh.sequence={sequence}: "
            f"their product must divide {num_heads}"
        )
    return 1
