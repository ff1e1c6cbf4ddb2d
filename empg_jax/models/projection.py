"""The linear layer of every block: a kernel, plain or quantized, and optional low-rank adapters.

The names of its parameters decide how a layer computes: ``kernel``, a quantized form of it
(`models.quantize`) or its transpose ``kernel_t`` (`transpose_kernels`), ``bias``, and ``lora_a``, ``lora_b``
(`models.lora`). `project` has a custom gradient, because XLA:CPU computes the automatic gradient of a kernel
slowly. A kernel's gradient has the type of the parameter, which may be wider than the computation's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from empg_jax.models.products import multiply_transposed
from empg_jax.models.quantize import SCHEMES
from empg_jax.parallel.layout import num_shards
from empg_jax.types import Params, wide_type


class Linear(nn.Module):
    """The layer ``inputs @ kernel + adapter + bias``, with parameters and initializers as `flax.linen.Dense`.

    Attributes:
      features: size of the output.
      dtype: type of the computation.
      param_dtype: type of the parameters.
      kernel_init: initializer of the kernel.
      use_bias: whether a bias is added.
      lora_scale: factor of the adapter's product, if there is an adapter.
    """

    features: int
    dtype: Any
    param_dtype: Any
    kernel_init: Callable[..., Array]
    use_bias: bool = True
    lora_scale: float = 1.0

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch D"]) -> Float[Array, "*batch E"]:
        """Map the last axis of ``inputs``."""
        inputs = inputs.astype(self.dtype)
        outputs = self._base_product(inputs)
        if self.has_variable("params", "lora_a"):
            down: Array = self.get_variable("params", "lora_a")
            up: Array = self.get_variable("params", "lora_b")
            outputs = outputs + self.lora_scale * project(project(inputs, down), up)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), self.param_dtype)
            outputs = add_bias(outputs, bias)
        return outputs

    def _base_product(self, inputs: Array) -> Array:
        for scheme in SCHEMES.values():
            if self.has_variable("params", scheme.leaves[0]):
                held: list[Array] = [self.get_variable("params", name) for name in scheme.leaves]
                matrix, scale = scheme.unpack(self.dtype, *held)
                outputs = project(inputs, matrix)
                if scale is None:
                    return outputs
                return (outputs.astype(jnp.float32) * _row(scale, outputs.ndim)).astype(self.dtype)
        if self.has_variable("params", "kernel_t"):
            transposed: Array = self.get_variable("params", "kernel_t")
            rows = inputs.reshape(-1, inputs.shape[-1])
            outputs = multiply_transposed(rows, transposed.astype(inputs.dtype))
            return outputs.reshape(*inputs.shape[:-1], self.features)
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features), self.param_dtype)
        return project(inputs, kernel)


def _row(vector: Array, ndim: int) -> Array:
    return vector.reshape((1,) * (ndim - 1) + vector.shape)


@jax.custom_vjp
def project(inputs: Float[Array, "*batch D"], kernel: Float[Array, "D E"]) -> Float[Array, "*batch E"]:
    """Compute ``inputs @ kernel`` in the type of the inputs.

    The gradient is hand-written. The kernel's is computed, and added up over devices, in the kernel's own
    type, which may be wider than the computation's. The automatic one would be narrow, and a product of two
    transposed matrices, which XLA:CPU computes from a transposed copy of the output's gradient.
    """
    return inputs @ kernel.astype(inputs.dtype)


def _forward(inputs: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return project(inputs, kernel), (inputs, kernel)


def _backward(residuals: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    inputs, kernel = residuals
    d_inputs = jnp.einsum("...e,de->...d", slope, kernel.astype(inputs.dtype))
    if num_shards("time") > 1:  # flattening two split axes into one would gather the inputs
        return d_inputs, jnp.einsum("...d,...e->de", inputs, slope, preferred_element_type=kernel.dtype)
    rows = inputs.reshape(-1, inputs.shape[-1]), slope.reshape(-1, slope.shape[-1])
    cpu, default = (functools.partial(f, dtype=kernel.dtype) for f in (_transposed_first, _contract_rows))
    return d_inputs, jax.lax.platform_dependent(*rows, cpu=cpu, default=default)


def _contract_rows(inputs: Array, slope: Array, dtype: Any) -> Array:
    return jnp.einsum("md,me->de", inputs, slope, preferred_element_type=dtype)


def _transposed_first(inputs: Array, slope: Array, dtype: Any) -> Array:
    """Compute ``inputs.T @ slope`` with a transposition of the narrower of the two, by itself."""
    if inputs.shape[1] > slope.shape[1]:
        return jax.lax.optimization_barrier(_transposed_first(slope, inputs, dtype)).T
    # The barrier keeps XLA from folding the transposition back into the product.
    transposed = jax.lax.optimization_barrier(inputs.T)
    return jnp.matmul(transposed, slope, preferred_element_type=dtype)


project.defvjp(_forward, _backward)


def transpose_kernels(layer: Params) -> Params:
    """Replace each plain ``kernel [in out]`` of a single layer by ``kernel_t [out in]`` (`models.products`).

    Args:
      layer: the layer's modules; those without a ``kernel`` are kept.
    """

    def transpose(module: Params) -> Params:
        rest = {name: leaf for name, leaf in module.items() if name != "kernel"}
        is_matrix = "kernel" in module and module["kernel"].ndim == 2  # not one for each expert
        return rest | {"kernel_t": module["kernel"].T} if is_matrix else module

    return {name: transpose(module) for name, module in layer.items()}


@jax.custom_vjp
def add_bias(outputs: Float[Array, "*batch E"], bias: Float[Array, "E"]) -> Float[Array, "*batch E"]:
    """Add a bias in the type of the outputs; its gradient is added up in float32."""
    return outputs + _row(bias.astype(outputs.dtype), outputs.ndim)


def _add_forward(outputs: Array, bias: Array) -> tuple[Array, Array]:
    return add_bias(outputs, bias), bias


def _add_backward(bias: Array, slope: Array) -> tuple[Array, Array]:
    total = jnp.sum(slope, axis=tuple(range(slope.ndim - 1)), dtype=wide_type(bias.dtype))
    return slope, total.astype(bias.dtype)


add_bias.defvjp(_add_forward, _add_backward)
