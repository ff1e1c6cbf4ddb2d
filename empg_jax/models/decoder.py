"""The decoder of the Llama / Qwen2 / Qwen3 family, in the order config, block, parameters, forward, cache.

The learner and the engine use the same block (Flax Linen through its functional ``init`` / ``apply``). The
learner scans over stacked layers with rematerialization. The engine unrolls over unstacked layers with a KV
cache. On a mesh, the learner's pass is split as `parallel.layout` describes.
Parameters are a plain dictionary::

    embed/embedding [V D]    layers/<block parameter> [L ...]    final_norm/scale [D]    head/embedding [V D]

``head`` is absent if embeddings are tied. ``value_head`` (``kernel [D]``, ``bias []``) exists only for
algorithms with a critic. Matrices have the axes ``[in, out]``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from empg_jax.models.attention import (
    BACKENDS,
    SAVED,
    Segments,
    attend_pages,
    attend_rows,
    packed_attention,
    sliced_attention,
    trunk_attention,
)
from empg_jax.models.axes import gather_layer
from empg_jax.models.axes import param_axes as param_axes
from empg_jax.models.lora import LoraConfig
from empg_jax.models.moe import MoeConfig, make_experts, mix_experts
from empg_jax.models.norm import RMSNorm, rms_norm
from empg_jax.models.projection import Linear
from empg_jax.models.rope import RopeScaling as RopeScaling
from empg_jax.models.rope import compute_angles, rotate
from empg_jax.parallel.layout import (
    Where,
    constrain,
    current_mesh,
    embed_tokens,
    split_attention,
    split_cached_attention,
)
from empg_jax.types import Params

# Per layer (keys, values), each [S K C d], or a pool of pages [K N P d]; `DecoderConfig.joined_heads` as one.
KVCache = tuple[tuple[jax.Array, jax.Array], ...]
# Checkpoint names that each rematerialization policy keeps for the backward pass, besides each layer's input.
# ``full`` keeps only attention's result and recomputes the rest. ``dots`` keeps the results of all matrix
# products, so that only elementwise operations are recomputed. ``none`` keeps everything.
REMAT: dict[str, tuple[str, ...] | None] = {
    "full": (SAVED,),
    "dots": (SAVED, "qkv", "residual", "mlp"),
    "none": None,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and numerics of a decoder. It is hashable, so that it can be a static argument of `jax.jit`."""

    vocab_size: int
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 16
    intermediate_size: int = 256
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False
    value_head: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    reduce_dtype: Any = jnp.float32  # of sums of gradients over devices, where it is wider than dtype
    remat: str = "full"  # a key of REMAT
    scan_layers: bool = True  # True: one scanned program for all layers; False: unrolled layers
    attention: str = "auto"  # a key of attention.BACKENDS: the platform's kernel if it fits, or plain XLA
    moe: MoeConfig | None = None  # None: one MLP of intermediate_size
    lora: LoraConfig | None = None  # None: every parameter is trained
    fused_projections: bool = False  # the layers come from `fuse_projections` (the engine's copy)
    joined_heads: int = 1  # key/value heads side by side in the engine's cache (`attention.joined`)

    def __post_init__(self) -> None:
        """Refuse inconsistent shapes and unknown options."""
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary positions")
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r} is unknown; choose {', '.join(REMAT)}")
        if self.attention not in BACKENDS:
            raise ValueError(f"attention={self.attention!r} is unknown; choose {', '.join(BACKENDS)}")


# --------------------------------------------------------------------------------------------- block


_RESIDUAL = ("rows", "time", None)  # logical axes of the residual stream


class Block(nn.Module):
    """A pre-norm block: attention, then a gated MLP or a mixture of experts."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array, rope: tuple[Array, Array], attend: Callable[..., tuple[Array, Any]]) -> Any:
        """Map ``x [B T D]`` to the next layer's input.

        ``attend(q, k, v)`` returns ``(output, cache)``. The caller supplies it, because the learner attends
        over packed rows and the engine over a KV cache.
        """
        c = self.config
        batch, length, _ = x.shape
        norm = functools.partial(RMSNorm, c.norm_eps, c.param_dtype)
        dense = functools.partial(
            Linear,
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            lora_scale=1.0 if c.lora is None else c.lora.scale,
            kernel_init=nn.initializers.variance_scaling(1.0, "fan_in", "normal"),
        )
        # Small initial outputs: the sum over a deep stack of blocks must not drown the token's embedding.
        onto_residual = functools.partial(
            dense,
            use_bias=False,
            kernel_init=nn.initializers.variance_scaling(0.5 / c.num_layers, "fan_in", "normal"),
        )
        with jax.named_scope("attention"):
            h = norm(name="input_norm")(x)
            sizes = [n * c.head_dim for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
            if c.fused_projections:
                qkv = dense(sum(sizes), use_bias=c.qkv_bias, name="qkv_proj")(h)
                q, k, v = jnp.split(qkv, [sizes[0], sizes[0] + sizes[1]], axis=-1)
            else:
                names = ("q_proj", "k_proj", "v_proj")
                q, k, v = (
                    dense(size, use_bias=c.qkv_bias, name=name)(h)
                    for size, name in zip(sizes, names, strict=True)
                )
            q = q.reshape(batch, length, c.num_heads, c.head_dim)
            k = k.reshape(batch, length, c.num_kv_heads, c.head_dim)
            v = v.reshape(batch, length, c.num_kv_heads, c.head_dim)
            q, k, v = checkpoint_name([constrain(a, "rows", "time", "heads", None) for a in (q, k, v)], "qkv")
            if c.qk_norm:
                q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
            output, cache = attend(rotate(q, rope), rotate(k, rope), v)
            output = output.reshape(batch, length, c.num_heads * c.head_dim)
            x = constrain(x + onto_residual(c.hidden_size, name="o_proj")(output), *_RESIDUAL)
            x = checkpoint_name(x, "residual")
        with jax.named_scope("mlp"):
            h = norm(name="post_norm")(x)
            if c.moe is None:
                if c.fused_projections:
                    both = dense(2 * c.intermediate_size, use_bias=False, name="gate_up_proj")(h)
                    gate, up = jnp.split(both, 2, axis=-1)
                else:
                    gate = dense(c.intermediate_size, use_bias=False, name="gate_proj")(h)
                    up = dense(c.intermediate_size, use_bias=False, name="up_proj")(h)
                gate, up = checkpoint_name([constrain(a, "rows", "time", "mlp") for a in (gate, up)], "mlp")
                change = onto_residual(c.hidden_size, name="down_proj")(nn.silu(gate) * up)
            else:
                logits = dense(c.moe.num_experts, use_bias=False, name="router")(h)
                matrices = make_experts(c.moe, c.hidden_size, c.num_layers, c.dtype, c.param_dtype)
                change = mix_experts(h, logits, *matrices, c.moe)
            x = constrain(x + change, *_RESIDUAL)
        return x, cache


def compute_rope(config: DecoderConfig, positions: Int[Array, "B T"]) -> tuple[Array, Array]:
    """Compute cosine and sine ``[B, T, 1, head_dim / 2]`` of the rotary angles, in float32."""
    return compute_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)


# ---------------------------------------------------------------------------------------- parameters


def init_params(key: jax.Array, config: DecoderConfig) -> Params:
    """Initialize random parameters.

    Matrices are normal with standard deviation 1/sqrt(fan-in). Matrices that write onto the residual stream
    are smaller by the factor sqrt(2 layers). Input embeddings have standard deviation 1, so that the outputs
    of the blocks do not drown them. The head has 1/sqrt(D); a tied table has the head's value. Norm scales
    start at 1, biases at 0.
    """
    embed_key, layers_key, head_key = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, config.hidden_size), config.dtype)
    rope = compute_rope(config, jnp.zeros((1, 1), jnp.int32))
    block = Block(config)

    def init_layer(layer_key: jax.Array) -> Params:
        return block.init(layer_key, x, rope, lambda q, k, v: (q, None))["params"]

    def init_table(table_key: jax.Array, scale: float) -> dict[str, jax.Array]:
        table = scale * jax.random.normal(table_key, (config.vocab_size, config.hidden_size))
        return {"embedding": table.astype(config.param_dtype)}

    head_scale = config.hidden_size**-0.5
    params = {
        "embed": init_table(embed_key, head_scale if config.tie_embeddings else 1.0),
        "layers": jax.vmap(init_layer)(jax.random.split(layers_key, config.num_layers)),
        "final_norm": {"scale": jnp.ones((config.hidden_size,), config.param_dtype)},
    }
    if not config.tie_embeddings:
        params["head"] = init_table(head_key, head_scale)
    if config.value_head:
        params["value_head"] = init_value_head(config)
    return params


def init_value_head(config: DecoderConfig) -> Params:
    """Initialize a critic's parameters with zeros, so that all first values are 0."""
    return {
        "kernel": jnp.zeros((config.hidden_size,), config.param_dtype),
        "bias": jnp.zeros((), config.param_dtype),
    }


def output_embedding(params: Params) -> Array:
    """Return the ``[V, D]`` matrix of the head, tied or not."""
    return params["head" if "head" in params else "embed"]["embedding"]


def compute_values(params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """Compute the critic's value of each state, in float32."""
    head = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params["value_head"])
    return jnp.einsum("btd,d->bt", hidden.astype(jnp.float32), head["kernel"]) + head["bias"]


def unstack_layers(params: Params, num_layers: int) -> Params:
    """Return the same parameters with ``layers`` as a tuple of single layers."""
    leaves, structure = jax.tree.flatten(params["layers"])
    # The gradient of one split is one concatenation. The gradient of L indexings would sum L padded copies.
    split = [jax.lax.split(leaf, (1,) * num_layers) for leaf in leaves]
    layers = (
        jax.tree.unflatten(structure, [jax.lax.squeeze(s[i], (0,)) for s in split]) for i in range(num_layers)
    )
    return {**params, "layers": tuple(layers)}


# Fused projection -> the projections that it joins; they all multiply the same input.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def fuse_projections(layer: Params) -> Params:
    """Join the matrices of a layer that multiply the same input (see `FUSED`).

    A decode step has few rows, so that a product costs one kernel launch and one read of its matrix. Fewer
    products mean fewer launches.

    Args:
      layer: parameters of a single layer, without adapters, not quantized.
    """
    fused = dict(layer)
    for name, parts in FUSED.items():
        if parts[0] in fused:
            pieces = [fused.pop(part) for part in parts]
            fused[name] = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *pieces)
    return fused


# ------------------------------------------------------------------------------------------- forward


def forward(
    params: Params,
    config: DecoderConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    trunk_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Compute the normalized final hidden states of packed rows.

    Args:
      params: stacked parameters, or unstacked ones, whose layers are then unrolled.
      config: the model's config; ``remat`` and ``scan_layers`` control how the layers run.
      tokens: packed rows.
      positions: position inside the segment.
      segment_ids: packed sequence of each token.
      trunk_ids: the segment that each token's own one continues (`attention.trunks`); None: there are none.
        Time must not be split over devices then.
    """
    rope = compute_rope(config, positions)
    block = Block(config)
    is_split = current_mesh() is not None
    attention: Callable[..., Array] = functools.partial(packed_attention, backend=config.attention)
    segments: Array | Segments = segment_ids
    if trunk_ids is not None:
        attention, segments = trunk_attention, Segments(segment_ids, trunk_ids)

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
        return split_attention(attention, sliced_attention, q, k, v, segments), None

    def layer(x: Array, layer_params: Params) -> Any:
        if is_split:
            layer_params = gather_layer(layer_params, config.head_dim, config.dtype, config.reduce_dtype)
        return block.apply({"params": layer_params}, x, rope, attend)

    if not config.scan_layers:
        params = unstack_layers(params, config.num_layers)
    layers = params["layers"]
    is_written_out = isinstance(layers, tuple)
    if (kept := REMAT[config.remat]) is not None:
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
        # Inside a scan the loop already keeps the compiler from merging the recomputation with the forward
        # pass (common subexpression elimination); unrolled layers need `prevent_cse`.
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=is_written_out)
    x = constrain(embed(params, config, tokens), *_RESIDUAL)
    if is_written_out:
        for layer_params in layers:
            x, _ = layer(x, layer_params)
    else:
        x, _ = jax.lax.scan(layer, x, layers)
    return rms_norm(x, params["final_norm"]["scale"], config.norm_eps)


def embed(params: Params, config: DecoderConfig, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Look up the input embeddings, in the compute type."""
    return embed_tokens(params["embed"]["embedding"], tokens, config.dtype)


def init_cache(config: DecoderConfig, slots: int, capacity: int) -> KVCache:
    """Return an empty KV cache: per layer keys and values ``[slots, K, capacity, d]``."""
    return _zeros(config, slots, None, capacity)


def init_pool(config: DecoderConfig, num_pages: int, page_tokens: int) -> KVCache:
    """Return empty pages: per layer keys and values ``[K, num_pages, page_tokens, d]``."""
    return _zeros(config, None, num_pages, page_tokens)


def _zeros(config: DecoderConfig, *sizes: int | None) -> KVCache:
    shape = [config.num_kv_heads // config.joined_heads if size is None else size for size in sizes]
    zeros = functools.partial(jnp.zeros, (*shape, config.head_dim * config.joined_heads), config.dtype)
    return tuple((zeros(), zeros()) for _ in range(config.num_layers))


def forward_cached(
    params: Params,
    config: DecoderConfig,
    tokens: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    cache: KVCache,
    rows: Int[Array, "R"] | None = None,
    *,
    pages: Int[Array, "R C"] | None = None,
) -> tuple[Float[Array, "R T D"], KVCache]:
    """Compute the final hidden states of new tokens over a KV cache.

    Args:
      params: parameters from `unstack_layers`.
      config: the model's config.
      tokens: new tokens of each row.
      positions: position of each token. A position at or beyond the capacity marks a pad, which is not
        written to the cache.
      cache: keys and values of the earlier tokens; the new ones are written into it.
      rows: cache row of each token row; None means that row ``i`` is cache row ``i``. A row index beyond
        the cache marks a pad.
      pages: the pages of each token row, where the cache is a pool; ``rows`` then means nothing.

    Returns:
      Normalized final hidden states and the new cache.
    """
    rope = compute_rope(config, positions)
    block = Block(config)

    def attend_here(q: Array, k: Array, v: Array, cache: tuple[Array, Array], where: Where) -> Any:
        if where.pages is not None:
            return attend_pages(q, (k, v), cache, where.pages, where.positions)
        return attend_rows(q, (k, v), cache, where.rows, where.positions)

    @jax.jit  # traced once for all layers; the compiler dissolves the call
    def layer(x: Array, layer_params: Params, layer_cache: tuple[Array, Array]) -> tuple[Array, Any]:
        def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
            return split_cached_attention(attend_here, q, k, v, layer_cache, Where(positions, rows, pages))

        return block.apply({"params": layer_params}, x, rope, attend)

    x = embed(params, config, tokens)
    new_cache = []  # a scan would copy each layer's weights, keys and values (`scripts/README.md`)
    for layer_params, layer_cache in zip(params["layers"], cache, strict=True):
        x, layer_cache = layer(x, layer_params, layer_cache)
        new_cache.append(layer_cache)
    return rms_norm(x, params["final_norm"]["scale"], config.norm_eps), tuple(new_cache)
