"""Mixture of experts in place of a block's MLP (Qwen3-MoE): a router, and experts that get different tokens.

The tokens are sorted by expert, and `jax.lax.ragged_dot` multiplies each expert's group of rows with its
matrices. The results are weighted and sorted back. No token is dropped or padded. On a mesh the experts are
split over ``tensor``: every device computes its own experts for its tokens, and the partial results are
summed.
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
from jaxtyping import Array, Float, Int

from empg_jax.models.quantize import SCHEMES, dequantize_module
from empg_jax.parallel.layout import ACTIVATIONS, current_mesh
from empg_jax.parallel.mesh import RULES, fit_spec
from empg_jax.types import Params


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Shape of a mixture of experts.

    Attributes:
      num_experts: number of experts of a layer.
      top_k: number of experts that compute each token.
      expert_size: width of an expert's gated feed-forward layer.
      is_normalized: whether a token's router probabilities are scaled to a sum of 1 over its experts.
    """

    num_experts: int
    top_k: int
    expert_size: int
    is_normalized: bool = True

    def __post_init__(self) -> None:
        """Refuse a ``top_k`` outside of 1 .. ``num_experts``."""
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k} must lie between 1 and num_experts={self.num_experts}")


class Experts(nn.Module):
    """One matrix ``[in, out]`` per expert, plain or quantized."""

    shape: tuple[int, int, int]
    dtype: Any
    param_dtype: Any
    scale: float = 1.0

    @nn.compact
    def __call__(self) -> Float[Array, "E D F"]:
        """Return all matrices: quantized ones in ``dtype``, others as they are kept."""
        for scheme in SCHEMES.values():
            if self.has_variable("params", scheme.leaves[0]):
                held: Params = {name: self.get_variable("params", name) for name in scheme.leaves}
                return jax.vmap(lambda module: dequantize_module(module, self.dtype))(held)
        start = nn.initializers.variance_scaling(self.scale, "fan_in", "normal", batch_axis=(0,))
        kernel: Array = self.param("kernel", start, self.shape, self.param_dtype)
        return kernel


def make_experts(
    config: MoeConfig, hidden_size: int, num_layers: int, dtype: Any, param_dtype: Any
) -> tuple[Array, Array, Array]:
    """Create the matrices ``gate``, ``up`` and ``down`` of a block's experts; call it inside of the block."""
    count, size = config.num_experts, config.expert_size
    into, out_of = (count, hidden_size, size), (count, size, hidden_size)
    # As in a dense block, the matrices that write onto the residual stream start small.
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
    """Compute ``sum over a token's experts e of p_e down_e(silu(gate_e h) * up_e h)``.

    Args:
      hidden: normalized states.
      logits: the router's output; the softmax over all experts is taken in float32.
      gate: gate matrices of all experts.
      up: up matrices of all experts.
      down: down matrices of all experts.
      config: number of experts per token, and whether their probabilities are scaled to a sum of 1.
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
        check_vma=False,  # ragged_dot does not declare how its results vary over devices
    )(hidden, logits, gate, up, down)


def _mix(
    hidden: Array, logits: Array, gate: Array, up: Array, down: Array, *, config: MoeConfig, axis: str | None
) -> Array:
    """Compute the contribution of these experts: all of them, or one device's part if split over ``axis``."""
    states = hidden.reshape(-1, hidden.shape[-1])
    shares, chosen = _route(logits.reshape(len(states), -1), config)
    held = gate.shape[0]
    if axis is not None:  # indices relative to this device's first expert
        chosen = chosen - jax.lax.axis_index(axis) * held
    is_here = jnp.logical_and(chosen >= 0, chosen < held).reshape(-1)
    # Rows of other devices' experts get the largest key, so that they are sorted behind all own groups.
    keys = jnp.where(is_here, chosen.reshape(-1), held)
    order = jnp.argsort(keys)
    counts = jnp.zeros((held,), jnp.int32).at[keys].add(1, mode="drop")
    rows = states[order // config.top_k]
    first, second = (multiply(rows, matrices, counts) for matrices in (gate, up))
    first, second = checkpoint_name((first, second), "mlp")
    results = multiply(nn.silu(first) * second, down, counts)
    results = results * shares.reshape(-1)[order][:, None].astype(results.dtype)
    mixed = results[jnp.argsort(order)].reshape(len(states), config.top_k, -1).sum(axis=1)
    mixed = mixed if axis is None else jax.lax.psum(mixed, axis)
    return mixed.reshape(hidden.shape)


@jax.custom_vjp
def multiply(
    rows: Float[Array, "M D"], matrices: Float[Array, "E D F"], counts: Int[Array, "E"]
) -> Float[Array, "M F"]:
    """Multiply each expert's rows with its matrix, in the type of the rows.

    The gradient of the matrices is computed, and added up over devices, in their own type, which may be wider
    (as in `models.projection.project`). Rows behind the last expert's are zeros, and so are their gradients.
    """
    return _in_groups(jax.lax.ragged_dot(rows, matrices.astype(rows.dtype), counts), counts)


def _in_groups(rows: Array, counts: Array) -> Array:
    """Set rows behind the last group, which a TPU leaves unwritten, to zero; NaN may stand there."""
    is_in = jnp.arange(len(rows)) < jnp.sum(counts)
    return jnp.where(is_in[:, None], rows, jnp.zeros((), rows.dtype))


def _forward(rows: Array, matrices: Array, counts: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return multiply(rows, matrices, counts), (rows, matrices, counts)


def _backward(residuals: tuple[Array, Array, Array], slope: Array) -> tuple[Array, Array, None]:
    rows, matrices, counts = residuals
    product = jax.lax.ragged_dot_general
    d_rows = _in_groups(product(slope, matrices.astype(rows.dtype), counts, _BACK), counts)
    d_matrices = product(rows, slope, counts, _PER_EXPERT, preferred_element_type=matrices.dtype)
    return d_rows, d_matrices, None


# Rows times the transposed matrix of their group; and sums over the rows of each group, one matrix per group.
_BACK = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)
_PER_EXPERT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)
multiply.defvjp(_forward, _backward)


def _route(logits: Array, config: MoeConfig) -> tuple[Array, Array]:
    """Return weight and index of each token's experts, both ``[tokens, top_k]``."""
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    shares, chosen = jax.lax.top_k(probabilities, config.top_k)
    if config.is_normalized:
        shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
    return shares, chosen
