"""The engine's device programs: prefill, decode and the state of the slots. Pure functions, jitted once.

The cache and the slots are donated to `prefill` and `decode` and come back from them, so nothing is copied.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from empg_jax.models.decoder import DecoderConfig, KVCache, forward_cached, output_embedding, unstack_layers
from empg_jax.rollout.sampling import fold_keys, position_uniforms, sample
from empg_jax.types import Params


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine.

    Attributes:
      slots: conversations held at one time.
      max_tokens: longest conversation, in tokens.
      max_response_tokens: longest response of a turn.
      stop_ids: sampling one of these ends a response (the token belongs to the response).
      burst: decode steps per dispatch at most.
      prefill_buckets: lengths that prefill chunks are padded to; default 16, 64, 256 up to ``max_tokens``.
      row_buckets: row counts that prefill groups are padded to; default 1, 8, 64 … and ``slots``.
      cache_buckets: physical cache lengths; default powers of two from 128 to ``max_tokens``.
    """

    slots: int
    max_tokens: int
    max_response_tokens: int
    stop_ids: tuple[int, ...]
    burst: int = 8
    prefill_buckets: tuple[int, ...] = ()
    row_buckets: tuple[int, ...] = ()
    cache_buckets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Fill the bucket lists and refuse sizes that cannot work."""
        if not self.stop_ids:
            raise ValueError("stop_ids is empty: no response could ever end by itself")
        if not 0 < self.max_response_tokens < self.max_tokens:
            raise ValueError(
                f"max_response_tokens={self.max_response_tokens} must lie in "
                f"[1, max_tokens={self.max_tokens})"
            )
        lengths = [n for n in (16, 64, 256, 1024) if n < self.max_tokens] or [self.max_tokens]
        rows = [n for n in (1, 8, 64) if 2 * n <= self.slots]
        capacities = [n for n in (2**i for i in range(7, 31)) if n < self.max_tokens]
        object.__setattr__(self, "prefill_buckets", tuple(sorted(self.prefill_buckets or lengths)))
        object.__setattr__(self, "row_buckets", tuple(sorted({*(self.row_buckets or rows), self.slots})))
        object.__setattr__(
            self, "cache_buckets", tuple(sorted({*(self.cache_buckets or capacities), self.max_tokens}))
        )


@flax.struct.dataclass
class SlotState:
    """What the device knows of each slot between dispatches (S slots, R = max_response_tokens)."""

    last_tokens: jax.Array  # int32[S]  sampled, not yet in the cache
    positions: jax.Array  # int32[S]    position of the last token
    is_active: jax.Array  # bool[S]     still decoding
    counts: jax.Array  # int32[S]       tokens of the response so far
    budgets: jax.Array  # int32[S]      most tokens of the response
    keys: jax.Array  # key[S]           folded from (stream, group, member, turn)
    tokens: jax.Array  # int32[S R]
    logprobs: jax.Array  # float32[S R]
    entropies: jax.Array  # float32[S R]


def init_slots(config: EngineConfig) -> SlotState:
    """Slots without conversations."""
    slots, response = config.slots, config.max_response_tokens

    def integers() -> jax.Array:  # donated, so no two fields may share a buffer
        return jnp.zeros((slots,), jnp.int32)

    return SlotState(
        last_tokens=integers(),
        positions=integers(),
        is_active=jnp.zeros((slots,), bool),
        counts=integers(),
        budgets=integers(),
        keys=jax.random.split(jax.random.key(0), slots),
        tokens=jnp.zeros((slots, response), jnp.int32),
        logprobs=jnp.zeros((slots, response), jnp.float32),
        entropies=jnp.zeros((slots, response), jnp.float32),
    )


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted programs of one model and one set of sizes."""

    prefill: Any
    decode: Any
    unstack: Any
    grow: Any


@functools.cache
def compile_programs(model: DecoderConfig, config: EngineConfig) -> Programs:
    """The programs, shared by engines of equal shape so that nothing compiles twice."""
    return Programs(
        prefill=jax.jit(functools.partial(prefill, model, config), donate_argnums=(1, 2)),
        decode=jax.jit(functools.partial(decode, model, config), donate_argnums=(1, 2)),
        unstack=jax.jit(functools.partial(_cast_and_unstack, model)),
        grow=jax.jit(grow, static_argnums=1),
    )


def _cast_and_unstack(model: DecoderConfig, params: Params) -> Params:
    # A copy even where nothing changes: the learner donates its own buffers to the next update.
    cast = jax.tree.map(lambda leaf: jnp.copy(leaf).astype(model.dtype), params)
    return unstack_layers(cast, model.num_layers)


def grow(cache: KVCache, capacity: int) -> KVCache:
    """A copy of the cache with more room."""
    more = capacity - cache[0][0].shape[2]
    return jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, 0), (0, more), (0, 0))), cache)


def _logits(params: Params, hidden: jax.Array) -> jax.Array:
    return jnp.einsum("rd,vd->rv", hidden, output_embedding(params), preferred_element_type=jnp.float32)


def _is_stop(config: EngineConfig, tokens: jax.Array) -> jax.Array:
    return functools.reduce(jnp.logical_or, [tokens == stop for stop in config.stop_ids])


def prefill(
    model: DecoderConfig,
    config: EngineConfig,
    params: Params,
    cache: KVCache,
    state: SlotState,
    key: jax.Array,
    rows: jax.Array,
    tokens: jax.Array,
    plan: jax.Array,
    temperature: jax.Array,
) -> tuple[KVCache, SlotState]:
    """Write new tokens of some slots into the cache; rows whose prompt is complete sample their first token.

    Args:
      model: decoder config (static).
      config: engine config (static).
      params: unstacked parameters.
      cache: the KV cache (donated).
      state: the slots (donated).
      key: the run's key.
      rows: int32[R], slot of each row; a number beyond the slots is a pad.
      tokens: int32[R, P], right-padded.
      plan: int32[R, 8]: start position, token count, prompt complete?, budget, ids (4).
      temperature: scalar.

    Returns:
      The cache and the slots.
    """
    start, count, completes, budget = plan[:, 0], plan[:, 1], plan[:, 2] > 0, plan[:, 3]
    capacity = jnp.int32(cache[0][0].shape[2])
    offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    positions = jnp.where(offsets < count[:, None], start[:, None] + offsets, capacity)
    hidden, cache = forward_cached(
        params, model, tokens, positions, cache, None if rows.shape[0] == config.slots else rows
    )
    last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    keys = fold_keys(key, plan[:, 4:8])
    uniforms = position_uniforms(keys, jnp.zeros((rows.shape[0], 1), jnp.int32))[:, 0]
    first, logprobs, entropies = sample(_logits(params, last), uniforms, temperature)
    # Rows that do not sample now write nowhere.
    target = jnp.where(completes, rows, jnp.int32(config.slots))
    is_active = jnp.logical_and(budget > 1, jnp.logical_not(_is_stop(config, first)))

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[target].set(new, mode="drop")

    return cache, SlotState(
        last_tokens=put(state.last_tokens, first),
        positions=put(state.positions, start + count),
        is_active=put(state.is_active, is_active),
        counts=put(state.counts, jnp.ones_like(first)),
        budgets=put(state.budgets, budget),
        keys=put(state.keys, keys),
        tokens=state.tokens.at[target, 0].set(first, mode="drop"),
        logprobs=state.logprobs.at[target, 0].set(logprobs, mode="drop"),
        entropies=state.entropies.at[target, 0].set(entropies, mode="drop"),
    )


def decode(
    model: DecoderConfig,
    config: EngineConfig,
    params: Params,
    cache: KVCache,
    state: SlotState,
    temperature: jax.Array,
) -> tuple[KVCache, SlotState, jax.Array]:
    """Up to ``config.burst`` decode steps for every active slot; ends early when none is active.

    An idle slot computes along and writes its key where the next prefill will overwrite it.

    Returns:
      The cache, the slots, and the number of steps made.
    """
    offsets = jnp.arange(config.burst, dtype=jnp.int32)[None, :]
    uniforms = position_uniforms(state.keys, state.counts[:, None] + offsets)
    slots = jnp.arange(config.slots)

    def body(carry: tuple[KVCache, SlotState, jax.Array]) -> tuple[KVCache, SlotState, jax.Array]:
        cache, state, step = carry
        hidden, cache = forward_cached(
            params, model, state.last_tokens[:, None], state.positions[:, None], cache
        )
        tokens, logprobs, entropies = sample(_logits(params, hidden[:, 0]), uniforms[:, step], temperature)
        # Idle slots write beyond their response buffer, which drops the write.
        column = jnp.where(state.is_active, state.counts, jnp.int32(config.max_response_tokens))
        grown = state.counts + state.is_active.astype(jnp.int32)
        ended = jnp.logical_or(_is_stop(config, tokens), grown >= state.budgets)
        state = SlotState(
            last_tokens=jnp.where(state.is_active, tokens, state.last_tokens),
            positions=state.positions + state.is_active.astype(jnp.int32),
            counts=grown,
            tokens=state.tokens.at[slots, column].set(tokens, mode="drop"),
            logprobs=state.logprobs.at[slots, column].set(logprobs, mode="drop"),
            entropies=state.entropies.at[slots, column].set(entropies, mode="drop"),
            is_active=jnp.logical_and(state.is_active, jnp.logical_not(ended)),
            budgets=state.budgets,
            keys=state.keys,
        )
        return cache, state, step + 1

    def going(carry: tuple[KVCache, SlotState, jax.Array]) -> jax.Array:
        _, state, step = carry
        return jnp.logical_and(step < config.burst, jnp.any(state.is_active))

    return jax.lax.while_loop(going, body, (cache, state, jnp.int32(0)))
