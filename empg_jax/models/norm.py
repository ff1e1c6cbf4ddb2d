"""The root-mean-square norm (arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    eps: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalize the last axis of ``x``."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        return rms_norm(x, scale, self.eps)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Compute ``x / sqrt(mean(x^2) + eps) * scale`` over the last axis in float32, in the type of ``x``."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + jnp.float32(eps))
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + scale.shape)
    return (wide * scale).astype(x.dtype)
