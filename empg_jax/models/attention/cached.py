"""Attention of new tokens over a KV cache: two batched products, or a kernel of the platform.

A decode step has one query per row, so its time is the time to read the cache. The products read the whole
cache. The kernels of `ragged` (GPUs) and `tpu` read only the filled part, where they support its shape.

A prefill has many queries per row. Those whose scores would need more memory than `SCORES` go block by block,
with the same numbers: every query sees all of its keys at once. The kernel of `prefill` (TPUs) keeps none.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from empg_jax.models.attention import ragged, tpu
from empg_jax.models.attention.dispatch import by_platform, load_late
from empg_jax.models.attention.joined import join, separate
from empg_jax.models.products import multiply_transposed

# Score of a hidden key. It is finite, so that a row without any visible key gives no NaN.
MASKED = -1e30
# Most scores that are in memory at one time: 256 MiB in float32.
SCORES = 2**26


def attend_rows(
    queries: Float[Array, "R T H d"],
    new: tuple[Float[Array, "R T K d"], Float[Array, "R T K d"]],
    cache: tuple[Float[Array, "S J C w"], Float[Array, "S J C w"]],
    rows: Int[Array, "R"] | None,
    positions: Int[Array, "R T"],
) -> tuple[Float[Array, "R T H d"], tuple[Array, Array]]:
    """Write keys and values of new tokens into rows of a cache, and compute the tokens' attention over them.

    Args:
      queries: rotated queries of the new tokens.
      new: their keys and values.
      cache: all rows of keys, and of values; heads may be `joined`.
      rows: the row of each; one beyond the cache is dropped. None: all rows in their order.
      positions: as in `cached_attention`.

    Returns:
      The attention output, in the type of the queries, and the cache.
    """
    keys, values = written = tuple(
        write_rows(old, join(x, old.shape[3]), rows, positions) for old, x in zip(cache, new, strict=True)
    )
    if rows is not None:
        keys, values = (jnp.take(w, rows, axis=0, mode="clip") for w in written)
    return cached_attention(queries, keys, values, positions), (written[0], written[1])


def cached_attention(
    queries: Float[Array, "R T H d"],
    keys: Float[Array, "R J C w"],
    values: Float[Array, "R J C w"],
    positions: Int[Array, "R T"],
) -> Float[Array, "R T H d"]:
    """Compute attention of new tokens over a KV cache that already holds them.

    Args:
      queries: rotated queries of the new tokens.
      keys: the cached keys; key ``c`` has position ``c`` in its row.
      values: the cached values, in the same order.
      positions: position of each new token, consecutive in a row. A token sees the keys at positions up to
        its own. Positions beyond the cache, behind the others, mark pads, whose output is finite but
        otherwise undefined.

    Returns:
      The attention output, in the type of the queries.
    """
    capacity = keys.shape[2]
    if queries.shape[1] == 1 and ragged.takes(capacity, keys.shape[3], queries.dtype):
        # Length 0 for pads: the kernel then reads nothing for idle rows.
        lengths = jnp.where(positions[:, 0] < capacity, positions[:, 0] + 1, 0)
        return _decode(queries[:, 0], keys, values, lengths)[0][:, None]
    if queries.shape[1] > 1:
        return _prefill(queries, keys, values, positions)[0]
    return attend(queries, keys, values, positions)


def write_rows(
    cache: Float[Array, "S K C d"],
    new: Float[Array, "R T K d"],
    rows: Int[Array, "R"] | None,
    positions: Int[Array, "R T"],
) -> Float[Array, "S K C d"]:
    """Write new keys, or values, into rows of the cache.

    Args:
      cache: all rows.
      new: what is written.
      rows: the row of each; one beyond the cache is dropped. None: all rows in their order.
      positions: where it is written in its row; a position beyond the row is dropped.
    """
    if rows is None:
        rows = jnp.arange(cache.shape[0])
    on_cpu = _write if positions.size > 1 else _write_twice
    return jax.lax.platform_dependent(
        cache, new, rows, positions, cpu=on_cpu, tpu=_write_flat, default=_write
    )


def _write(cache: Array, new: Array, rows: Array, positions: Array) -> Array:
    return cache.at[rows[:, None], :, positions].set(new, mode="drop")


def _write_twice(cache: Array, new: Array, rows: Array, positions: Array) -> Array:
    # XLA:CPU copies the cache for a single write; several are made in place.
    return _write(cache, jnp.repeat(new, 2, axis=1), rows, jnp.repeat(positions, 2, axis=1))


def _write_flat(cache: Array, new: Array, rows: Array, positions: Array) -> Array:
    slots, kv_heads, capacity, depth = cache.shape
    if depth % tpu.LANES:
        return _write(cache, new, rows, positions)
    row, position = rows[:, None, None], positions[..., None]
    row = jnp.where((row < slots) & (position < capacity), row, slots)
    return tpu.write_flat(
        cache, new, (row * kv_heads + jnp.arange(kv_heads)[None, None]) * capacity + position
    )


def _dense_decode(queries: Array, keys: Array, values: Array, lengths: Array) -> tuple[Array]:
    """Compute a decode step by products over the whole cache."""
    return (attend(queries[:, None], keys, values, lengths[:, None] - 1)[:, 0],)


def _decode_tpu(queries: Array, keys: Array, values: Array, lengths: Array) -> tuple[Array]:
    size = tpu.largest_block(keys.shape[2])
    if not tpu.takes(keys.shape[3], queries.dtype, size):
        return _dense_decode(queries, keys, values, lengths)
    return (tpu.decode_rows(queries, keys, values, lengths),)


_decode = by_platform("decode_attention", _dense_decode, cuda=ragged.decode, tpu=_decode_tpu)


_prefill = by_platform(
    "prefill_attention",
    lambda *arrays: (attend(*arrays),),
    tpu=load_late("empg_jax.models.attention.prefill", "attend_on_tpu"),
)


def attend(queries: Array, keys: Array, values: Array, positions: Array) -> Array:
    """Attend in blocks of queries whose scores fit into `SCORES`."""
    rows, length, heads, depth = queries.shape
    keys, values = separate(keys, depth), separate(values, depth)
    fitting = max(1, SCORES // (rows * heads * keys.shape[2]))
    if fitting >= length:
        return _attend_at_once(queries, keys, values, positions)
    size = next(n for n in range(fitting, 0, -1) if length % n == 0)

    def split(array: Array) -> Array:
        return jnp.moveaxis(array.reshape(rows, length // size, size, *array.shape[2:]), 1, 0)

    output = jax.lax.map(
        lambda block: _attend_at_once(block[0], keys, values, block[1]), (split(queries), split(positions))
    )
    return jnp.moveaxis(output, 0, 1).reshape(queries.shape)


def _attend_at_once(queries: Array, keys: Array, values: Array, positions: Array) -> Array:
    rows, length, heads, depth = queries.shape
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    groups = heads // kv_heads
    # With the batch axes first, the two products make a decode step on a CPU a fifth faster.
    grouped = jnp.swapaxes(queries.reshape(rows, length, kv_heads, groups, depth), 1, 2)
    grouped = grouped.reshape(rows, kv_heads, length * groups, depth)
    scores = multiply_transposed(grouped, keys, jnp.float32, few=16)
    scores = scores * jnp.float32(depth**-0.5)
    last = jnp.repeat(positions, groups, axis=1)[:, None, :, None]
    visible = jnp.arange(capacity)[None, None, None] <= last
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.float32(MASKED)), axis=-1)
    output = jnp.einsum("rkqc,rkcd->rkqd", weights.astype(values.dtype), values)
    output = jnp.swapaxes(output.reshape(rows, kv_heads, length, groups, depth), 1, 2)
    return output.reshape(rows, length, heads, depth)
