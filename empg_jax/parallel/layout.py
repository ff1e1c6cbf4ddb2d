"""The layout of activations and weights on the device mesh.

A program enters its mesh with `on_mesh`. Inside it, the functions of this module constrain arrays by their
logical axes, and split embedding lookups and attention over devices. Outside of a mesh they do nothing, so
that the same model code runs on one device and on many.

============  =======================================================================================
rows          split over ``data`` x ``fsdp``
time          split over ``sequence``. For attention an all-to-all splits the heads instead of the time, so
              that every device has whole rows of some heads; where the heads cannot be divided, keys and
              values are gathered.
heads, mlp    split over ``tensor``
vocabulary    split over ``tensor``; log-probabilities are combined from one number per token and device
weights       stored split over ``fsdp`` x ``sequence``. A layer's weights are gathered when the layer runs,
              and their gradients are scattered again.
============  =======================================================================================
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from empg_jax.parallel.mesh import AXES, RULES, Axis, MeshAxes, fit_spec, mesh_axes
from empg_jax.types import wide_type

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
    """Wrap a function so that it is traced inside the mesh; a mesh of one device returns it unchanged."""
    if mesh.size == 1:
        return function

    @functools.wraps(function, assigned=())
    def traced(*args: Any, **options: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **options)

    return traced


def current_mesh() -> AbstractMesh | None:
    """Return the mesh of the current `on_mesh`, or None outside of it.

    The result is also None inside of `jax.shard_map`, where a function sees only one device's part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Inside of `jax.shard_map` the axes are manual instead of automatic.
    is_ours = mesh.axis_names == AXES and all(kind == AxisType.Auto for kind in mesh.axis_types)
    return mesh if is_ours else None


def num_shards(axis: str) -> int:
    """Return the number of parts that an activation's logical axis is split into; 1 outside of a mesh."""
    mesh = current_mesh()
    names = ACTIVATIONS[axis]
    if mesh is None or names is None:
        return 1
    return math.prod(mesh.shape[name] for name in mesh_axes(names))


def constrain(x: Array, *axes: str | None) -> Array:
    """Constrain the layout of ``x`` by the logical axes of its dimensions.

    A dimension that its mesh axes do not divide is replicated.
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, fit_spec(mesh, axes, x.shape, ACTIVATIONS))


# ------------------------------------------------------------------------------------------ weights

_STORAGE = mesh_axes(RULES["embed"])  # mesh axes that split weights between their uses


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_weight(weight: Array, axes: tuple[Axis, ...], sent: Any = None) -> Array:
    """Gather a weight from the shards that it is stored in; its gradient is scattered to shards again.

    Args:
      weight: a parameter. Its type is that of the result, and that in which its gradient is added up.
      axes: its logical axes (`models.decoder.param_axes`).
      sent: the type in which it is sent, whose rounding the result has; default its own.
    """
    return _pin(weight.astype(sent or weight.dtype), axes, is_whole=True).astype(weight.dtype)


def _gather(weight: Array, axes: tuple[Axis, ...], sent: Any) -> tuple[Array, None]:
    return gather_weight(weight, axes, sent), None


def _scatter(axes: tuple[Axis, ...], sent: Any, _: None, slope: Array) -> tuple[Array]:
    return (shard_weight(slope, axes),)


gather_weight.defvjp(_gather, _scatter)


def shard_weight(weight: Array, axes: tuple[Axis, ...]) -> Array:
    """Constrain an array of a parameter's shape, such as its gradient, to the parameter's layout."""
    return _pin(weight, axes, is_whole=False)


def _pin(weight: Array, axes: tuple[Axis, ...], *, is_whole: bool) -> Array:
    mesh = current_mesh()
    if mesh is None:
        return weight
    spec = fit_spec(mesh, axes, weight.shape, RULES)
    if is_whole:
        spec = PartitionSpec(*(None if set(mesh_axes(names)) & set(_STORAGE) else names for names in spec))
    return jax.lax.with_sharding_constraint(weight, spec)


def embed_tokens(table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
    """Look up the embeddings of tokens, in ``dtype``.

    On a mesh every device looks up all tokens of its ``fsdp`` x ``sequence`` group in its own part of the
    table; tokens of other parts give zeros. All-to-alls then send each device the embeddings of its own
    tokens. No device holds the whole table, and the gradient of a part stays on the device that owns it,
    which adds it up in float32.
    """
    mesh = current_mesh()
    if mesh is None:
        return _look_up(table, tokens, dtype)
    rows, time = fit_spec(mesh, ("rows", "time"), tokens.shape, ACTIVATIONS)
    table_spec = fit_spec(mesh, ("vocab", "embed"), table.shape, RULES)
    vocab, depth = (tuple(name for name in mesh_axes(names) if mesh.shape[name] > 1) for names in table_spec)
    # Axis of the tokens that each mesh axis splits. An axis that splits no tokens needs no exchange.
    split = {name: axis for axis, names in enumerate((rows, time)) for name in mesh_axes(names)}
    depth = tuple(name for name in depth if name in split)
    others = tuple(name for name in split if name not in vocab + depth)  # all devices have the same part

    def local(table: Array, tokens: Array) -> Array:
        table = jax.lax.pcast(table, others, to="varying")  # its gradients are summed over them
        for name in depth:
            tokens = jax.lax.all_gather(tokens, name, axis=split[name], tiled=True)
        if vocab:
            tokens = tokens - jax.lax.axis_index(vocab) * table.shape[0]
        # Tokens of other devices' parts read row 0, which the mask replaces by zeros before the sum.
        is_mine = jnp.logical_and(tokens >= 0, tokens < table.shape[0])
        found = _look_up(table, jnp.where(is_mine, tokens, 0), dtype)
        found = jnp.where(is_mine[:, :, None], found, jnp.zeros((), dtype))
        if vocab:
            found = jax.lax.psum(found, vocab)
        for name in reversed(depth):  # the last mesh axis splits the finest
            found = jax.lax.all_to_all(found, name, split_axis=split[name], concat_axis=2, tiled=True)
        return found

    return jax.shard_map(
        local,
        in_specs=(PartitionSpec(vocab or None, depth or None), PartitionSpec(rows, time)),
        out_specs=PartitionSpec(rows, time, None),
    )(table, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up(table: Array, tokens: Array, dtype: Any) -> Array:
    return jnp.take(table, tokens, axis=0).astype(dtype)


def _look_up_forward(table: Array, tokens: Array, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    return _look_up(table, tokens, dtype), (table, tokens)


def _look_up_backward(dtype: Any, residuals: tuple[Array, Array], slope: Array) -> tuple[Array, None]:
    # The automatic sum has the table's type: in bfloat16, 4,096 equal tokens of slope 1 make 256.
    table, tokens = residuals
    wide = wide_type(table.dtype)
    return jnp.zeros(table.shape, wide).at[tokens].add(slope.astype(wide)).astype(table.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


# ---------------------------------------------------------------------------------------- attention


def split_attention(
    attention: Callable[[Array, Array, Array, Any], Array],
    sliced: Callable[[Array, Array, Array, Any, Array], Array],
    queries: Float[Array, "B T H d"],
    keys: Float[Array, "B T K d"],
    values: Float[Array, "B T K d"],
    segments: Any,
) -> Float[Array, "B T H d"]:
    """Compute ``attention(queries, keys, values, segments)`` split over devices by rows and heads.

    If time is split, an all-to-all splits the heads instead, so that a device has whole rows. Fewer key/value
    heads than devices are repeated. Where the query heads cannot be divided, the keys and values of whole
    rows are gathered, and ``sliced`` computes each device's own part of the queries.

    Args:
      attention: attention over whole rows of ``H / n`` query heads and their key/value heads.
      sliced: attention of a part of the queries; its last argument is the place of the first one.
      queries: rotated queries.
      keys: rotated keys.
      values: values.
      segments: packed sequence of each token, int32[B T], or a tuple of such arrays.
    """
    mesh = current_mesh()
    if mesh is None:
        return attention(queries, keys, values, segments)
    shards = head_shards(dict(mesh.shape), queries.shape[2])
    repeats = math.lcm(keys.shape[2], math.prod(shards)) // keys.shape[2]
    keys, values = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (keys, values))
    (rows,) = fit_spec(mesh, ("rows",), queries.shape[:1], ACTIVATIONS)
    is_time_split = mesh.shape["sequence"] > 1
    spec = PartitionSpec(
        rows, "sequence" if is_time_split else None, "tensor" if shards.tensor > 1 else None, None
    )

    def swap(x: Array, split_axis: int, concat_axis: int) -> Array:
        return jax.lax.all_to_all(x, "sequence", split_axis, concat_axis, tiled=True)

    def local(queries: Array, keys: Array, values: Array, segments: Any) -> Array:
        if not is_time_split:
            return attention(queries, keys, values, segments)
        if shards.sequence == 1:
            k, v = (jax.lax.all_gather(x, "sequence", axis=1, tiled=True) for x in (keys, values))
            start = jax.lax.axis_index("sequence") * queries.shape[1]
            return sliced(queries, k, v, segments, start)
        q, k, v = (swap(x, split_axis=2, concat_axis=1) for x in (queries, keys, values))
        return swap(attention(q, k, v, segments), split_axis=1, concat_axis=2)

    return jax.shard_map(
        local,
        in_specs=(spec, spec, spec, PartitionSpec(rows, None)),
        out_specs=spec,
        check_vma=False,  # kernels do not declare how their results vary over devices
    )(queries, keys, values, segments)


class Where(NamedTuple):
    """The place of new tokens in a cache, for the R rows of a pass."""

    positions: Array  # int32[R T]
    rows: Array | None = None  # int32[R]  None: all rows of the cache in their order
    pages: Array | None = None  # int32[R C]


def split_cached_attention(
    attend: Callable[[Array, Array, Array, tuple[Array, Array], Where], Any],
    queries: Float[Array, "R T H d"],
    keys: Float[Array, "R T K d"],
    values: Float[Array, "R T K d"],
    cache: tuple[Array, Array],
    where: Where,
) -> tuple[Float[Array, "R T H d"], tuple[Array, Array]]:
    """Compute ``attend(queries, keys, values, cache, where)`` on every device's part of rows and heads.

    Args:
      attend: writes new keys and values into a cache, and computes attention over it.
      queries: rotated queries of the new tokens.
      keys: their rotated keys.
      values: their values.
      cache: all keys and values: rows ``[S K C d]``, or pages ``[K N P d]``, which all rows share.
      where: the place of the new tokens. Where the cache's rows are split, an equal number of a pass's rows
        has to belong to each part, in the order of the parts; rows beyond the cache belong to any.

    Returns:
      The attention output and the new cache.
    """
    mesh = current_mesh()
    if mesh is None:
        return attend(queries, keys, values, cache, where)
    is_paged = where.pages is not None
    kept = fit_spec(mesh, ("heads", None) if is_paged else ("rows", "heads"), cache[0].shape[:2], ACTIVATIONS)
    rows, heads = (None, kept[0]) if is_paged else kept
    new = PartitionSpec(rows, None, heads, None)
    per_row = PartitionSpec(rows)

    def local(queries: Array, keys: Array, values: Array, cache: tuple[Array, Array], where: Where) -> Any:
        if where.rows is not None and rows is not None:
            size = cache[0].shape[0]
            mine = where.rows - jax.lax.axis_index(mesh_axes(rows)) * size
            where = where._replace(rows=jnp.where((mine >= 0) & (mine < size), mine, size))
        return attend(queries, keys, values, cache, where)

    return jax.shard_map(
        local,
        in_specs=(new, new, new, kept, per_row),
        out_specs=(new, kept),
        check_vma=False,  # kernels do not declare how their results vary over devices
    )(queries, keys, values, cache, where)


class HeadShards(NamedTuple):
    """The number of parts that attention's heads are split into along two mesh axes."""

    tensor: int
    sequence: int


def head_shards(mesh_shape: Mapping[str, int], num_heads: int) -> HeadShards:
    """Return how attention's heads are split; 1 along an axis that cannot divide them.

    Args:
      mesh_shape: size of each mesh axis.
      num_heads: number of query heads.
    """
    tensor = mesh_shape["tensor"] if num_heads % mesh_shape["tensor"] == 0 else 1
    sequence = mesh_shape["sequence"]
    return HeadShards(tensor, sequence if num_heads % (tensor * sequence) == 0 else 1)


def cache_heads(num_heads: int, num_kv_heads: int, tensor: int) -> int:
    """Return the number of key/value heads that an engine over ``tensor`` devices keeps.

    Heads that the devices do not divide are repeated until they do, where the query heads allow it.
    """
    repeated = math.lcm(num_kv_heads, tensor)
    return num_kv_heads if num_heads % repeated else repeated


def cache_heads_here(num_heads: int, num_kv_heads: int, tensor: int) -> int:
    """Return the number of these heads on each device: all where the devices do not divide them."""
    kept = cache_heads(num_heads, num_kv_heads, tensor)
    return kept if kept % tensor else kept // tensor
