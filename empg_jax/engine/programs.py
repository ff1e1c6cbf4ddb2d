"""The engine's device programs: prefill and decode over one KV cache. Pure functions, jitted once.

Between dispatches only the cache lives on the device. Every program takes it as a donated argument and
returns it, so it is never copied. The host's knowledge of the slots goes in with each dispatch as a small
table.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from empg_jax.engine.cache import copy_pages, copy_rows, grow
from empg_jax.engine.sampling import fold_keys, position_uniforms, sample, sample_filtered
from empg_jax.engine.sizes import EngineConfig
from empg_jax.models.attention.tpu import LANES
from empg_jax.models.axes import param_shardings, repeat_kv_heads
from empg_jax.models.decoder import (
    DecoderConfig,
    KVCache,
    forward_cached,
    fuse_projections,
    init_cache,
    init_pool,
    output_embedding,
    unstack_layers,
)
from empg_jax.models.filtering import uses_filter
from empg_jax.models.products import multiply_transposed
from empg_jax.models.projection import transpose_kernels
from empg_jax.models.quantize import cast_params
from empg_jax.parallel.layout import cache_heads, cache_heads_here
from empg_jax.parallel.mesh import named_sharding, replicated
from empg_jax.parallel.order import jit_on_mesh
from empg_jax.types import Leaf, Params

# By platform. On GPUs the compiler would merge products of one input (q, k, v; gate, up) by concatenating
# their weights inside the loop over steps: 1.7 times the traffic that a step of a 1.5B model needs.
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {"gpu": {"xla_gpu_dot_merger_threshold_mb": 0}}


@flax.struct.dataclass
class Chunk:
    """New tokens of some slots, for `prefill` (R rows, P tokens)."""

    rows: Leaf  # int32[R]      slot of each row; a number beyond the slots is a pad
    tokens: Leaf  # int32[R P]  right-padded
    spans: Leaf  # int32[R 2]   position of the first token, and how many there are
    pages: Leaf | None = None  # int32[R C]  pages of each row, with `EngineConfig.page_tokens`


@flax.struct.dataclass
class Request:
    """One dispatch of `decode` (S slots).

    A row of ``plan``: last token (not yet in the cache), its position, response tokens so far, response
    tokens still allowed (0: idle; -1: ``carried`` has these four), and the four ids that the slot's keys are
    folded from.
    """

    key: Leaf  # the run's key
    plan: Leaf  # int32[S 8]
    carried: Leaf  # int32[S 4]  the state of each slot after the burst before, which the host has not read
    limits: Leaf  # int32[2]  steps at most; responses that must have ended for an early end
    temperature: Leaf  # float32[S], or float32[] for all slots
    filters: Leaf | None = None  # float32[S 3]  each a `TokenFilter`, with `EngineConfig.has_filter`
    pages: Leaf | None = None  # int32[S C]  pages of each slot, with `EngineConfig.page_tokens`


@flax.struct.dataclass
class Burst:
    """The tokens that one decode dispatch sampled (N = burst, S slots).

    Row ``n`` is step ``n``. Entries of idle slots are meaningless.
    """

    tokens: jax.Array  # int32[N S]
    logprobs: jax.Array  # float32[N S]
    entropies: jax.Array  # float32[N S]
    counts: jax.Array  # int32[S]  tokens that the slot sampled; only the first rows of its column are valid
    steps: jax.Array  # int32[]    steps made
    full_logprobs: jax.Array | None = None  # float32[N S]  without the filter; with `EngineConfig.has_filter`


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted programs of one model and one set of sizes, and the layout that they work on."""

    layout: DecoderConfig
    new_cache: Callable[[int], KVCache]  # an empty cache of this length, on the engine's devices
    prefill: Any
    decode: Any
    unstack: Any
    grow: Any
    copy_rows: Any
    copy_pages: Any


@functools.cache
def compile_programs(model: DecoderConfig, config: EngineConfig, mesh: Mesh) -> Programs:
    """Build the programs; engines of equal shape share them, so that nothing compiles twice."""
    layout = lay_out(model, mesh)
    repeats = layout.num_kv_heads // model.num_kv_heads
    cache, burst = cache_sharding(mesh, layout, config), replicated(mesh)
    options = COMPILER_OPTIONS.get(mesh.devices.flat[0].platform)
    jit = functools.partial(jit_on_mesh, mesh, donate_argnums=1, compiler_options=options)
    (slots_axis, *_) = cache.spec
    copy = jax.shard_map(
        copy_rows,
        mesh=mesh,
        in_specs=(cache.spec, PartitionSpec(slots_axis)),
        out_specs=cache.spec,
        check_vma=False,  # each part makes as many steps as it has copies
    )
    return Programs(
        layout=layout,
        # Made in its place: the whole of it may not fit into one device.
        new_cache=jax.jit(
            functools.partial(_empty_cache, layout, config), static_argnums=0, out_shardings=cache
        ),
        prefill=jit(functools.partial(prefill, layout, config), out_shardings=cache),
        decode=jit(functools.partial(decode, layout, config), out_shardings=(cache, burst, burst)),
        unstack=jax.jit(functools.partial(_cast_and_unstack, layout, mesh, repeats)),
        # Not donated: a longer cache cannot reuse the memory of a shorter one.
        grow=jax.jit(grow, static_argnums=1, out_shardings=cache),
        copy_rows=jax.jit(copy, donate_argnums=0, out_shardings=cache),
        copy_pages=jax.jit(copy_pages, donate_argnums=0, out_shardings=cache),
    )


def _empty_cache(layout: DecoderConfig, config: EngineConfig, capacity: int) -> KVCache:
    """Return rows of this length, or the pool."""
    if config.page_tokens:
        return init_pool(layout, config.num_pages, config.page_tokens)
    return init_cache(layout, config.slots, capacity)


def cache_sharding(mesh: Mesh, model: DecoderConfig, config: EngineConfig) -> NamedSharding:
    """Return the sharding of a cache leaf: slots over ``data``, heads over ``tensor``.

    A leaf is ``[S K C d]``, or ``[K N P d]`` with pages, which are not split over ``data``.

    Raises:
      ValueError: slots with pages are split.
    """
    heads = model.num_kv_heads // model.joined_heads
    if config.page_tokens:
        if mesh.shape["data"] > 1:
            raise ValueError(
                f"page_tokens={config.page_tokens} with slots over data={mesh.shape['data']} devices: all "
                "slots use one pool; use data=1, or page_tokens=0"
            )
        return named_sharding(mesh, ("heads", None, None, None), (heads, 1, 1, 1))
    return named_sharding(mesh, ("slots", "heads", None, None), (config.slots, heads, 1, 1))


def lay_out(model: DecoderConfig, mesh: Mesh) -> DecoderConfig:
    """Return the decoder's config with the layout in which an engine on this mesh keeps weights and cache.

    One wide product saves launches. Over ``tensor`` a fused matrix would be cut in the wrong places, and
    adapters belong to single matrices.

    Key/value heads that ``tensor`` does not divide are repeated until it does, where the query heads allow
    it: else every device would hold, and gather for every burst, the whole cache.

    On a TPU narrow heads are joined where a device has enough of them, for its kernels of the cache.
    """
    tensor, platform = mesh.shape["tensor"], mesh.devices.flat[0].platform
    kv_heads, joined = cache_heads(model.num_heads, model.num_kv_heads, tensor), 1
    if platform == "tpu" and model.dtype == jnp.bfloat16 and LANES % model.head_dim == 0:
        joined = LANES // model.head_dim
    return dataclasses.replace(
        model,
        fused_projections=model.lora is None and tensor == 1,
        num_kv_heads=kv_heads,
        joined_heads=joined if cache_heads_here(model.num_heads, kv_heads, tensor) % joined == 0 else 1,
    )


def _cast_and_unstack(model: DecoderConfig, mesh: Mesh, repeats: int, params: Params) -> Params:
    # A copy even where nothing changes: the learner donates its own buffers to the next update.
    params = cast_params(jax.tree.map(jnp.copy, params), model.dtype)
    if repeats > 1:
        params = repeat_kv_heads(params, model.head_dim, repeats)
        params = jax.lax.with_sharding_constraint(params, param_shardings(mesh, params, model.head_dim))
    if "layers" not in params:
        return params
    placed = unstack_layers(params, len(jax.tree.leaves(params["layers"])[0]))
    if model.fused_projections:
        placed = placed | {"layers": tuple(map(fuse_projections, placed["layers"]))}
    if mesh.devices.flat[0].platform == "cpu":
        placed = placed | {"layers": tuple(map(transpose_kernels, placed["layers"]))}
    return placed


def prefill(
    model: DecoderConfig,
    config: EngineConfig,
    params: Params,
    cache: KVCache,
    chunk: Chunk,
) -> KVCache:
    """Write new tokens of some slots into the cache. Nothing is sampled: `decode` reads the newest token.

    Args:
      model: decoder config (static).
      config: engine config (static).
      params: unstacked parameters.
      cache: the KV cache (donated).
      chunk: the tokens, and where they go.

    Returns:
      The cache.
    """
    start, count = chunk.spans[:, :1], chunk.spans[:, 1:]
    offsets = jnp.arange(chunk.tokens.shape[1], dtype=jnp.int32)[None, :]
    capacity = _count_rows(cache, chunk.pages)
    # A position beyond the cache marks padding: the write of that token is dropped.
    positions = jnp.where(offsets < count, start + offsets, capacity)
    # With all slots at once row i is slot i, and no gather is needed.
    which = None if chunk.rows.shape[0] == config.slots else chunk.rows
    return forward_cached(params, model, chunk.tokens, positions, cache, which, pages=chunk.pages)[1]


def _count_rows(cache: KVCache, pages: jax.Array | None) -> jax.Array:
    """Return the first position beyond the rows of a cache, or beyond their pages."""
    return jnp.int32(cache[0][0].shape[2] * (1 if pages is None else pages.shape[1]))


def decode(
    model: DecoderConfig,
    config: EngineConfig,
    params: Params,
    cache: KVCache,
    request: Request,
) -> tuple[KVCache, jax.Array, Burst]:
    """Decode one burst of steps for the active slots.

    The burst ends after ``request.limits[0]`` steps, when no slot is active any more, or when
    ``request.limits[1]`` responses have ended. Idle slots are computed too, but write nothing.

    Args:
      model: decoder config (static).
      config: engine config (static).
      params: unstacked parameters.
      cache: the KV cache (donated).
      request: the state of each slot, the limits of the burst, and the temperature.

    Returns:
      The cache, the state of each slot for the next request (``carried``), and the sampled tokens.
    """
    plan, limits = request.plan, request.limits
    state = jnp.where(plan[:, 3:4] < 0, request.carried, plan[:, :4])
    last, position, done, allowed = (state[:, i] for i in range(4))
    offsets = jnp.arange(config.burst, dtype=jnp.int32)[None, :]
    # Drawn once per burst, not in the loop: a token's number depends on its position alone, not on the batch.
    uniforms = position_uniforms(fold_keys(request.key, plan[:, 4:]), done[:, None] + offsets).T
    head = output_embedding(params)
    # Idle slots write at this position, which lies beyond the cache, so the write is dropped.
    nowhere = _count_rows(cache, request.pages)
    grid = (config.burst, config.slots)
    zeros = jnp.zeros(grid, jnp.float32)
    full = zeros if config.has_filter else None
    empty = Burst(jnp.zeros(grid, jnp.int32), zeros, zeros, jnp.zeros_like(last), jnp.int32(0), full)
    draw = _choose_sampler(config, request, allowed)

    def body(
        carry: tuple[KVCache, jax.Array, jax.Array, Burst],
    ) -> tuple[KVCache, jax.Array, jax.Array, Burst]:
        cache, last, is_active, out = carry
        positions = jnp.where(is_active, position + out.counts, nowhere)
        hidden, cache = forward_cached(
            params, model, last[:, None], positions[:, None], cache, pages=request.pages
        )
        logits = multiply_transposed(hidden[:, 0], head, jnp.float32)
        tokens, logprobs, entropies, *full = draw(logits, uniforms[out.steps])
        counts = out.counts + is_active.astype(jnp.int32)
        ended = jnp.logical_or(_is_stop(config, tokens), counts >= allowed)
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=out.steps, axis=0)
        out = Burst(
            tokens=put(out.tokens, tokens),
            logprobs=put(out.logprobs, logprobs),
            entropies=put(out.entropies, entropies),
            counts=counts,
            steps=out.steps + 1,
            full_logprobs=None if out.full_logprobs is None else put(out.full_logprobs, *full),
        )
        return cache, tokens, jnp.logical_and(is_active, jnp.logical_not(ended)), out

    began = allowed > 0
    num_began = jnp.sum(began, dtype=jnp.int32)

    def goes_on(carry: tuple[KVCache, jax.Array, jax.Array, Burst]) -> jax.Array:
        _, _, is_active, out = carry
        left = jnp.sum(is_active, dtype=jnp.int32)
        is_patient = num_began - left < limits[1]
        return jnp.logical_and(out.steps < limits[0], jnp.logical_and(left > 0, is_patient))

    # A while loop, not a scan: the burst stops as soon as no slot is active.
    cache, last, is_active, out = jax.lax.while_loop(goes_on, body, (cache, last, began, empty))
    left = jnp.where(is_active, allowed - out.counts, 0)
    carried = jnp.stack([last, position + out.counts, done + out.counts, left], axis=1)
    return cache, carried, out


def _choose_sampler(
    config: EngineConfig, request: Request, allowed: jax.Array
) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    """Return what draws tokens from logits and uniforms. A filter costs nothing while no response has one."""
    if not config.has_filter:
        return lambda logits, uniforms: sample(logits, uniforms, request.temperature)
    filters = request.filters
    assert filters is not None
    is_on = jnp.any(uses_filter(filters) & (allowed > 0))

    def draw(logits: jax.Array, uniforms: jax.Array) -> tuple[jax.Array, ...]:
        def without() -> tuple[jax.Array, ...]:
            tokens, logprobs, entropies = sample(logits, uniforms, request.temperature)
            return tokens, logprobs, entropies, logprobs

        def within() -> tuple[jax.Array, ...]:
            return sample_filtered(logits, uniforms, request.temperature, filters)

        return jax.lax.cond(is_on, within, without)

    return draw


def _is_stop(config: EngineConfig, tokens: jax.Array) -> jax.Array:
    return functools.reduce(jnp.logical_or, [tokens == stop for stop in config.stop_ids])
