"""Rotary positions (arXiv 2104.09864), in Hugging Face's layout: the two halves of a head form the pairs."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency-dependent scaling of the rotary angles; the fields are those of the HF config."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


def compute_angles(
    positions: Int[Array, "B T"], head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Array, Array]:
    """Compute cosine and sine ``[B, T, 1, head_dim / 2]`` of the rotary angles, in float32."""
    half = head_dim // 2
    frequencies = 1.0 / theta ** (jnp.arange(half, dtype=jnp.float32) / jnp.float32(half))
    if scaling is not None:
        frequencies = _scale_frequencies(frequencies, scaling)
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def _scale_frequencies(frequencies: Array, scaling: RopeScaling) -> Array:
    wavelengths = 2 * jnp.pi / frequencies
    ratio = scaling.original_max_position / wavelengths
    smooth = (ratio - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return (1.0 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rotate(x: Float[Array, "B T n d"], rope: tuple[Array, Array]) -> Float[Array, "B T n d"]:
    """Apply rotary positions; the two halves of ``d`` form the pairs."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    shape = first.shape
    cos, sin = jnp.broadcast_to(cos, shape), jnp.broadcast_to(sin, shape)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
