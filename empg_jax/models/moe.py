"""Mixture of experts in a block's MLP's place (Qwen3-MoE): a router, and experts with tokens of their own.

Tokens are sorted by expert, each expert's run of rows is multiplied with its matrices
(`jax.lax.ragged_dot`), and the results go back weighted; no token is dropped and none is padded. On a mesh
the experts are split over ``tensor``: every device sends its tokens through its own experts, and the parts
are added up.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from empg_jax.models.quantize import SCHEMES, dequantize_module
from empg_jax.parallel.layout import ACTIVATIONS, current_mesh
from empg_jax.parallel.mesh import RULES, fit_spec
from empg_jax.types import Params


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Shape of a mixture.

    Attributes:
      num_experts: experts of a layer.
      top_k: experts that a token goes through.
      expert_size: width of an expert's gated feed-forward layer.
      is_normalized: whether a token's router probabilities are scaled to a sum of 1 over its experts.
    """

    num_experts: int
    top_k: int
    expert_size: int
    is_normalized: bool = True

    def __post_init__(self) -> None:
        """Refuse a choice among too few."""
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k} must lie between 1 and num_experts={self.num_experts}")


class Experts(nn.Module):
    """One matrix ``[in, out]`` per expert, held plain or quantized."""

    shape: tuple[int, int, int]
    dtype: Any
    param_dtype: Any
    scale: float = 1.0

    @nn.compact
    def __call__(self) -> Float[Array, "E D F"]:
        """All matrices, in ``dtype``."""
        for scheme in SCHEMES.values():
            if self.has_variable("params", scheme.leaves[0]):
                held: Params = {name: self.get_variable("params", name) for name in scheme.leaves}
                return jax.vmap(lambda module: dequantize_module(module, self.dtype))(held)
        start = nn.initializers.variance_scaling(self.scale, "fan_in", "normal", batch_axis=(0,))
        return self.param("kernel", start, self.shape, self.param_dtype).astype(self.dtype)


def make_experts(
    config: MoeConfig, hidden_size: int, num_layers: int, dtype: Any, param_dtype: Any
) -> tuple[Array, Array, Array]:
    """The matrices ``gate``, ``up`` and ``down`` of a block's experts; called inside of the block."""
    count, size = config.num_experts, config.expert_size
    into, out_of = (count, hidden_size, size), (count, size, hidden_size)
    # As in a plain block, what writes onto the residual stream starts small.
    return (
        Experts(into, dtype, param_dtype, name="gate_experts")(),
        Experts(into, dtype, param_dtype, name="up_experts")(),
        Experts(out_of, dtype, param_dtype, 0.5 / num_layers, name="down_experts")(),
    )


def mix_experts(
    hidden: Float[Array, "B T D"],
    logits: Float[Array, "B T E"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    config: MoeConfig,
) -> Float[Array, "B T D"]:
    """``sum over a token's experts e of p_e down_e(silu(gate_e h) * up_e h)``.

    Args:
      hidden: normed states.
      logits: the router's output; the soft-max over all experts is taken in float32.
      gate: an expert's first matrix.
      up: its second.
      down: its third.
      config: how many experts a token has, and whether their shares add up to 1.
    """
    mesh = current_mesh()
    if mesh is None:
        return _mix(hidden, logits, gate, up, down, config=config, axis=None)
    (experts,) = fit_spec(mesh, ("experts",), gate.shape[:1], RULES)
    axis = experts if isinstance(experts, str) and mesh.shape[experts] > 1 else None
    rows, time = fit_spec(mesh, ("rows", "time"), hidden.shape, ACTIVATIONS)
    tokens, matrices = PartitionSpec(rows, time), PartitionSpec(axis)
    return jax.shard_map(
        functools.partial(_mix, config=config, axis=axis),
        in_specs=(tokens, tokens, matrices, matrices, matrices),
        out_specs=tokens,
        check_vma=False,  # the grouped product does not say how its results vary over devices
    )(hidden, logits, gate, up, down)


def _mix(
    hidden: Array, logits: Array, gate: Array, up: Array, down: Array, *, config: MoeConfig, axis: str | None
) -> Array:
    """The share of the given experts, which are some of all where they are split over ``axis``."""
    states = hidden.reshape(-1, hidden.shape[-1])
    shares, chosen = _route(logits.reshape(len(states), -1), config)
    held = gate.shape[0]
    if axis is not None:
        chosen = chosen - jax.lax.axis_index(axis) * held
    is_here = jnp.logical_and(chosen >= 0, chosen < held).reshape(-1)
    keys = jnp.where(is_here, chosen.reshape(-1), held)  # what goes elsewhere stands last
    order = jnp.argsort(keys)
    counts = jnp.zeros((held,), jnp.int32).at[keys].add(1, mode="drop")
    rows = states[order // config.top_k]
    first, second = (jax.lax.ragged_dot(rows, matrices, counts) for matrices in (gate, up))
    first, second = checkpoint_name((first, second), "mlp")
    results = jax.lax.ragged_dot(nn.silu(first) * second, down, counts)
    results = results * shares.reshape(-1)[order][:, None].astype(results.dtype)
    results = jnp.where(is_here[order][:, None], results, jnp.zeros((), results.dtype))
    mixed = results[jnp.argsort(order)].reshape(len(states), config.top_k, -1).sum(axis=1)
    mixed = mixed if axis is None else jax.lax.psum(mixed, axis)
    return mixed.reshape(hidden.shape)


def _route(logits: Array, config: MoeConfig) -> tuple[Array, Array]:
    """Share and number of each of a token's experts, ``[tokens, top_k]``."""
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    shares, chosen = jax.lax.top_k(probabilities, config.top_k)
    if config.is_normalized:
        shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
    return shares, chosen
