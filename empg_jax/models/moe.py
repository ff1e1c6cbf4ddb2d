"""Mixture of experts in place of a block's MLP (Qwen3-MoE): a router, and experts that get different tokens.

The tokens are sorted by expert, and each expert's group of rows is multiplied with its matrices (`multiply`).
The results are weighted and sorted back. No token is dropped. On a mesh the experts are split over
``tensor``: every device computes its own experts for its tokens, and the partial results are summed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

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

BLOCK = 128  # rows of a block, where groups are padded to blocks
TOGETHER = 16  # blocks of one product
ROUND = 32  # rows per expert, on average, up to which all experts are computed at once


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
    product = functools.partial(multiply, config.num_experts)
    first, second = (product(rows, matrices, counts) for matrices in (gate, up))
    first, second = checkpoint_name((first, second), "mlp")
    results = product(nn.silu(first) * second, down, counts)
    results = results * shares.reshape(-1)[order][:, None].astype(results.dtype)
    mixed = results[jnp.argsort(order)].reshape(len(states), config.top_k, -1).sum(axis=1)
    mixed = mixed if axis is None else jax.lax.psum(mixed, axis)
    return mixed.reshape(hidden.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply(
    num_experts: int,
    rows: Float[Array, "M D"],
    matrices: Float[Array, "E D F"],
    counts: Int[Array, "E"],
) -> Float[Array, "M F"]:
    """Multiply each expert's rows with its matrix, in the type of the rows.

    TPUs have a kernel for `jax.lax.ragged_dot`. Elsewhere XLA would multiply every row with every matrix.
    There, each of very few rows is multiplied with a copy of its matrix. Few rows (a decode step) are
    computed by rounds of some rows of every expert, which read each matrix in place. Many are padded to
    blocks of one expert, and work grows with the rows of these experts alone.

    The gradient of the matrices is computed, and added up over devices, in their own type, which may be wider
    (as in `models.projection.project`). Rows behind the last expert's are zeros, and so are their gradients.

    Args:
      num_experts: number of experts of all devices, among which the rows are.
      rows: sorted by expert; those of other devices' experts last.
      matrices: of these experts.
      counts: rows of each.
    """
    default = _multiply_blocks
    if 3 * len(rows) <= num_experts:  # a copy is read, written and read
        default = _multiply_rows
    elif len(rows) <= ROUND * num_experts:
        size = 1 << (4 * len(rows) // num_experts - 1).bit_length()
        default = functools.partial(_multiply_rounds, min(BLOCK, max(8, size)))
    return jax.lax.platform_dependent(rows, matrices, counts, tpu=_multiply_groups, default=default)


def _multiply_groups(rows: Array, matrices: Array, counts: Array) -> Array:
    return _in_groups(jax.lax.ragged_dot(rows, matrices.astype(rows.dtype), counts), counts)


def _in_groups(rows: Array, counts: Array) -> Array:
    """Set rows behind the last group, which a TPU leaves unwritten, to zero; NaN may stand there."""
    is_in = jnp.arange(len(rows)) < jnp.sum(counts)
    return jnp.where(is_in[:, None], rows, jnp.zeros((), rows.dtype))


def _forward(
    num_experts: int, rows: Array, matrices: Array, counts: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    return multiply(num_experts, rows, matrices, counts), (rows, matrices, counts)


def _backward(
    num_experts: int, residuals: tuple[Array, Array, Array], slope: Array
) -> tuple[Array, Array, None]:
    del num_experts
    d_rows, d_matrices = jax.lax.platform_dependent(
        *residuals, slope, tpu=_slopes_of_groups, default=_slopes_of_blocks
    )
    return d_rows, d_matrices, None


def _slopes_of_groups(rows: Array, matrices: Array, counts: Array, slope: Array) -> tuple[Array, Array]:
    product = jax.lax.ragged_dot_general
    d_rows = _in_groups(product(slope, matrices.astype(rows.dtype), counts, _BACK), counts)
    return d_rows, product(rows, slope, counts, _PER_EXPERT, preferred_element_type=matrices.dtype)


# Rows times the transposed matrix of their group; and sums over the rows of each group, one matrix per group.
_BACK = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)
_PER_EXPERT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)
multiply.defvjp(_forward, _backward)


def _multiply_rows(rows: Array, matrices: Array, counts: Array) -> Array:
    owners = jnp.searchsorted(jnp.cumsum(counts), jnp.arange(len(rows), dtype=jnp.int32), side="right")
    own = matrices.at[owners].get(mode="fill", fill_value=0).astype(rows.dtype)
    return jnp.einsum("md,mdf->mf", rows, own)


def _multiply_rounds(size: int, rows: Array, matrices: Array, counts: Array) -> Array:
    """Multiply in rounds of ``size`` rows of every expert; mostly there is one."""
    matrices = matrices.astype(rows.dtype)
    starts, numbers = jnp.cumsum(counts) - counts, jnp.arange(size, dtype=jnp.int32)

    def add(turn: Array, found: Array) -> Array:
        inside = turn * size + numbers
        places = starts[:, None] + inside[None]
        places = jnp.where(inside[None] < counts[:, None], places, len(rows))
        part = rows.at[places].get(mode="fill", fill_value=0)
        return found.at[places].set(jnp.einsum("ecd,edf->ecf", part, matrices), mode="drop")

    zeros = jnp.zeros((len(rows), matrices.shape[2]), rows.dtype)
    return jax.lax.fori_loop(0, -(-jnp.max(counts) // size), add, zeros)


class _Blocks(NamedTuple):
    """Groups of rows that are padded to blocks, `TOGETHER` of them in a step.

    Attributes:
      num_steps: number of steps that have rows.
      owners: expert of each block.
      rows: the row at each place of each block; one beyond the last for none.
      places: place of each row among those of all blocks; one beyond the last for rows of no group.
    """

    num_steps: Int[Array, ""]
    owners: Int[Array, "S N"]
    rows: Int[Array, "S N P"]
    places: Int[Array, "M"]

    def take(self, values: Array, step: Array) -> Array:
        """Return the rows of a step's blocks, ``[N, P, D]``, with zeros where there is none."""
        return values.at[self.rows[step]].get(mode="fill", fill_value=0)

    def restore(self, values: Array) -> Array:
        """Return the rows of all groups, ``[M, D]``, from their blocks."""
        return values.reshape(-1, values.shape[-1]).at[self.places].get(mode="fill", fill_value=0)


def _lay_out(counts: Array, size: int) -> _Blocks:
    num_steps = -(-(size // BLOCK + len(counts)) // TOGETHER)  # no group leaves more than one block unfilled
    padded = -(-counts // BLOCK) * BLOCK
    starts, padded_starts = jnp.cumsum(counts) - counts, jnp.cumsum(padded) - padded
    firsts = jnp.arange(num_steps * TOGETHER, dtype=jnp.int32) * BLOCK
    last = len(counts) - 1
    owners = jnp.minimum(jnp.searchsorted(jnp.cumsum(padded), firsts, side="right"), last)
    inside = (firsts - padded_starts[owners])[:, None] + jnp.arange(BLOCK, dtype=jnp.int32)[None]
    rows = jnp.where(inside < counts[owners][:, None], starts[owners][:, None] + inside, size)
    numbers = jnp.arange(size, dtype=jnp.int32)
    groups = jnp.searchsorted(jnp.cumsum(counts), numbers, side="right")
    mine = jnp.minimum(groups, last)
    places = jnp.where(groups <= last, numbers - starts[mine] + padded_starts[mine], firsts.size * BLOCK)
    used = -(-jnp.sum(padded) // (BLOCK * TOGETHER))
    return _Blocks(used, owners.reshape(num_steps, -1), rows.reshape(num_steps, TOGETHER, BLOCK), places)


def _multiply_blocks(rows: Array, matrices: Array, counts: Array) -> Array:
    blocks = _lay_out(counts, len(rows))

    def put(step: Array, found: Array) -> Array:
        some = matrices[blocks.owners[step]].astype(rows.dtype)
        return found.at[step].set(jnp.einsum("npd,ndf->npf", blocks.take(rows, step), some))

    zeros = jnp.zeros((*blocks.rows.shape, matrices.shape[2]), rows.dtype)
    return blocks.restore(jax.lax.fori_loop(0, blocks.num_steps, put, zeros))


def _slopes_of_blocks(rows: Array, matrices: Array, counts: Array, slope: Array) -> tuple[Array, Array]:
    blocks = _lay_out(counts, len(rows))

    def add(step: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        d_rows, d_matrices = found
        owners, d_part = blocks.owners[step], blocks.take(slope, step)
        some = matrices[owners].astype(rows.dtype)
        d_some = jnp.einsum(
            "npd,npf->ndf", blocks.take(rows, step), d_part, preferred_element_type=jnp.float32
        )
        d_rows = d_rows.at[step].set(jnp.einsum("npf,ndf->npd", d_part, some))
        return d_rows, d_matrices.at[owners].add(d_some)

    zeros = jnp.zeros((*blocks.rows.shape, rows.shape[1]), rows.dtype)
    start = zeros, jnp.zeros(matrices.shape, jnp.float32)
    d_rows, d_matrices = jax.lax.fori_loop(0, blocks.num_steps, add, start)
    return blocks.restore(d_rows), d_matrices.astype(matrices.dtype)


def _route(logits: Array, config: MoeConfig) -> tuple[Array, Array]:
    """Return weight and index of each token's experts, both ``[tokens, top_k]``."""
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    shares, chosen = jax.lax.top_k(probabilities, config.top_k)
    if config.is_normalized:
        shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
    return shares, chosen
