"""The head: log-probability and entropy of given tokens, without ever holding ``[tokens, V]`` at once.

Shared by the learner, supervised fine-tuning and (through `token_statistics`) the engine.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Largest [tokens, chunk] slab of float32 logits that is alive at one time: 2**24 numbers are 64 MiB.
SLAB = 2**24
# The logit of a vocabulary entry that does not exist, and where running maxima start: finite, exp of it is 0.
LOWEST = -1e30


def token_statistics(
    logits: Float[Array, "M V"], tokens: Int[Array, "M"]
) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
    """Log-probability and entropy (nats) of ``tokens`` under ``softmax(logits)``; logits in float32."""
    logits = logits.astype(jnp.float32)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    shifted = logits - largest
    weights = jnp.exp(shifted)
    total = jnp.sum(weights, axis=-1)
    log_total = jnp.log(total)
    chosen = jnp.take_along_axis(shifted, tokens[:, None], axis=-1)[:, 0]
    entropies = log_total - jnp.sum(weights * shifted, axis=-1) / total
    return chosen - log_total, entropies


def compute_head(
    hidden: Float[Array, "M D"],
    weights: Float[Array, "V D"],
    tokens: Int[Array, "M"],
    temperature: float = 1.0,
    slab: int = SLAB,
) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
    """Log-probability and full-vocabulary entropy of each token, differentiable in both.

    With ``z = hidden @ weights.T / temperature``: ``logprob = z[token] - logsumexp(z)`` and
    ``entropy = logsumexp(z) - sum(softmax(z) * z)``. The vocabulary goes in chunks with a running maximum;
    the backward pass recomputes each chunk from two numbers per token:
    ``dz = g_lp (1[v = token] - p) - g_H p (z - E_p z)``.

    Args:
      hidden: normed final hidden states.
      weights: output embedding, one row per vocabulary entry.
      tokens: the tokens to score.
      temperature: divides the logits.
      slab: largest number of logits alive at one time.

    Returns:
      ``(logprobs, entropies)`` in float32, entropies in nats.
    """
    chunks = _num_chunks(hidden.shape[0], weights.shape[0], slab)
    return _head(hidden, weights, tokens, temperature, chunks)


def _num_chunks(num_tokens: int, vocab: int, slab: int) -> int:
    chunks = max(1, -(-num_tokens * vocab // slab))
    # A divisor close above avoids padding the embedding.
    for candidate in range(chunks, min(2 * chunks, vocab) + 1):
        if vocab % candidate == 0:
            return candidate
    return min(chunks, vocab)


def _chunked(weights: Array, chunks: int) -> Array:
    """``[C, ceil(V / C), D]``: chunk ``c`` holds rows ``v`` with ``v % C == c``.

    Strided chunks span every device when the vocabulary is sharded, so each scan step keeps all busy.
    """
    vocab, depth = weights.shape
    per_chunk = -(-vocab // chunks)
    padded = jnp.pad(weights, ((0, per_chunk * chunks - vocab), (0, 0))) if vocab % chunks else weights
    return jnp.swapaxes(padded.reshape(per_chunk, chunks, depth), 0, 1)


def _wide(dtype: Any) -> Any:
    """The type that sums are kept in: float32, or float64 for float64 inputs."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _chunk_logits(
    hidden: Array, chunk: Array, index: Array, vocab: int, chunks: int, temperature: float
) -> Array:
    wide = _wide(hidden.dtype)
    logits = jnp.einsum("md,vd->mv", hidden, chunk, preferred_element_type=wide)
    logits = logits * jnp.asarray(1 / temperature, wide)
    if vocab % chunks:
        exists = jnp.arange(chunk.shape[0], dtype=index.dtype) * chunks + index < vocab
        logits = jnp.where(exists[None, :], logits, jnp.asarray(LOWEST, wide))
    return logits


# Running maximum, sum of exponentials, sum of exponentials x logits, and the token's logit; each [M].
Running = tuple[Array, Array, Array, Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _head(
    hidden: Array, weights: Array, tokens: Array, temperature: float, chunks: int
) -> tuple[Array, Array]:
    return _head_forward(hidden, weights, tokens, temperature, chunks)[0]


def _head_forward(
    hidden: Array, weights: Array, tokens: Array, temperature: float, chunks: int
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    vocab, count = weights.shape[0], hidden.shape[0]
    wide = _wide(hidden.dtype)

    def step(carry: Running, inputs: tuple[Array, Array]) -> tuple[Running, None]:
        largest, total, weighted, target = carry
        index, chunk = inputs
        logits = _chunk_logits(hidden, chunk, index, vocab, chunks, temperature)
        new_largest = jnp.maximum(largest, jnp.max(logits, axis=-1))
        decay = jnp.exp(largest - new_largest)
        shifted = logits - new_largest[:, None]
        exponentials = jnp.exp(shifted)
        # Sums of shifted logits: else the entropy would be a small difference of large numbers.
        weighted = decay * (weighted + total * (largest - new_largest))
        weighted = weighted + jnp.sum(exponentials * shifted, axis=-1)
        total = total * decay + jnp.sum(exponentials, axis=-1)
        place = jnp.minimum(tokens // chunks, chunk.shape[0] - 1)
        mine = jnp.take_along_axis(logits, place[:, None], axis=-1)
        target = jnp.where(tokens % chunks == index, mine[:, 0], target)
        return (new_largest, total, weighted, target), None

    zeros = jnp.zeros((count,), wide)
    carry = (jnp.full((count,), LOWEST, wide), zeros, zeros, zeros)
    inputs = (jnp.arange(chunks, dtype=tokens.dtype), _chunked(weights, chunks))
    (largest, total, weighted, target), _ = jax.lax.scan(step, carry, inputs)
    mean_shifted = weighted / total
    outputs = (target - largest - jnp.log(total), jnp.log(total) - mean_shifted)
    return outputs, (hidden, weights, tokens, largest + jnp.log(total), largest + mean_shifted)


def _head_backward(
    temperature: float, chunks: int, residuals: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None]:
    hidden, weights, tokens, normaliser, mean_logit = residuals
    g_logprob, g_entropy = cotangents
    vocab, wide = weights.shape[0], _wide(hidden.dtype)

    def step(d_hidden: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        index, chunk = inputs
        logits = _chunk_logits(hidden, chunk, index, vocab, chunks, temperature)
        probabilities = jnp.exp(logits - normaliser[:, None])
        surprise = logits - mean_logit[:, None]
        slope = -probabilities * (g_logprob[:, None] + g_entropy[:, None] * surprise)
        is_target = jnp.arange(chunk.shape[0], dtype=index.dtype)[None, :] * chunks + index == tokens[:, None]
        slope = slope + jnp.where(is_target, g_logprob[:, None], jnp.zeros((), wide))
        slope = (slope * jnp.asarray(1 / temperature, wide)).astype(hidden.dtype)
        d_hidden = d_hidden + jnp.einsum("mv,vd->md", slope, chunk, preferred_element_type=wide)
        d_chunk = jnp.einsum("mv,md->vd", slope, hidden, preferred_element_type=wide)
        return d_hidden, d_chunk.astype(weights.dtype)

    zeros = jnp.zeros(hidden.shape, wide)
    inputs = (jnp.arange(chunks, dtype=tokens.dtype), _chunked(weights, chunks))
    d_hidden, d_chunks = jax.lax.scan(step, zeros, inputs)
    d_weights = jnp.swapaxes(d_chunks, 0, 1).reshape(-1, weights.shape[1])[:vocab]
    return d_hidden.astype(hidden.dtype), d_weights, None


_head.defvjp(_head_forward, _head_backward)
