"""The head: log-probability and entropy of given tokens, without all logits ``[tokens, V]`` in memory.

The learner and the warm start use it; the engine has the logits of one position at a time and uses
`engine.sampling`. On a mesh each device computes the logits of its own tokens and its own part of the
vocabulary. The devices exchange only one number per token and the embedding rows of one chunk.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from empg_jax.parallel.layout import constrain, gather_weight, num_shards, shard_weight

# Largest number of float32 logits [tokens, chunk] in memory at one time on a device. On a CPU, 64 MiB stay
# near the caches. An accelerator needs large products: with 16k tokens and V = 152k the larger slab takes an
# H100 60 ms instead of 99 ms.
SLABS = {"cpu": 2**24}
LARGE_SLAB = 2**28
MIN_BLOCK = 64  # tokens; smaller products would not pay for the rest that they save
# Logit of a padded vocabulary entry, and initial value of running maxima. It is finite, and its exp is 0.
LOWEST = -1e30


def compute_head(
    hidden: Float[Array, "*M D"],
    weights: Float[Array, "V D"],
    tokens: Int[Array, "*M"],
    temperature: float = 1.0,
    slab: int | None = None,
    mask: Bool[Array, "*M"] | None = None,
) -> tuple[Float[Array, "*M"], Float[Array, "*M"]]:
    """Compute log-probability and full-vocabulary entropy of each token; both have gradients.

    With ``z = hidden @ weights.T / temperature``: ``logprob = z[token] - logsumexp(z)`` and
    ``entropy = logsumexp(z) - sum(softmax(z) * z)``. The vocabulary is processed in chunks with a running
    maximum. The backward pass recomputes each chunk from two saved numbers per token, ``logsumexp(z)`` and
    ``E_p z``: ``dz = g_lp (1[v = token] - p) - g_H p (z - E_p z)``.

    Args:
      hidden: normalized final hidden states; on a mesh ``[B T D]`` with rows and time split.
      weights: output embedding, one row per vocabulary entry.
      tokens: the tokens to score.
      temperature: divides the logits.
      slab: largest number of logits in memory at one time on a device; default by platform (`slab_size`).
      mask: the tokens whose results are read; the others may be left out, and are then 0. Agents sample a
        small part of their rows' tokens. Rows that are split over devices are computed whole.

    Returns:
      ``(logprobs, entropies)`` in float32, entropies in nats.
    """
    slab = slab or slab_size()
    if mask is not None and (blocks := num_blocks(tokens.size)) > 1:
        size = tokens.size // blocks
        states, chunks = hidden.reshape(-1, hidden.shape[-1]), num_chunks(size, weights.shape[0], slab)
        found = _masked_head(
            states, weights, tokens.reshape(-1), mask.reshape(-1), temperature, chunks, blocks
        )
        return found[0].reshape(tokens.shape), found[1].reshape(tokens.shape)
    chunks = num_chunks(tokens.size, weights.shape[0], slab)
    if num_shards("time") > 1:  # flattening two split axes into one would gather the states
        return _head(hidden, weights, tokens, temperature, chunks)
    flat = hidden.reshape(-1, hidden.shape[-1]), weights, tokens.reshape(-1)  # faster products on CPUs
    logprobs, entropies = _head(*flat, temperature, chunks)
    return logprobs.reshape(tokens.shape), entropies.reshape(tokens.shape)


def slab_size() -> int:
    """Return the largest number of logits in memory at one time on a device of this platform."""
    return SLABS.get(jax.default_backend(), LARGE_SLAB)


def num_chunks(num_tokens: int, vocab: int, slab: int) -> int:
    """Return the number of vocabulary chunks for which a device's part of the logits fits the slab."""
    shards = num_shards("vocab")
    devices = shards * num_shards("rows") * num_shards("time")
    chunks = max(1, -(-num_tokens * vocab // (slab * devices)))
    # Prefer a divisor of the vocabulary: it avoids a padded copy of the embedding, and its chunks can be
    # split over the devices like the whole vocabulary.
    for candidate in range(chunks, min(2 * chunks, vocab) + 1):
        if vocab % (candidate * (shards if vocab % shards == 0 else 1)) == 0:
            return candidate
    return min(chunks, vocab)


def num_blocks(num_tokens: int) -> int:
    """Return the number of blocks of tokens that are computed or left out; 1 where all are computed."""
    if num_shards("rows") * num_shards("time") > 1:  # each device has its own tokens, and all work in step
        return 1
    fitting = (n for n in (16, 8, 4, 2) if num_tokens % n == 0 and num_tokens // n >= MIN_BLOCK)
    return next(fitting, 1)


def _chunked(weights: Array, chunks: int) -> Array:
    """Split the embedding into ``[C, ceil(V / C), D]``: chunk ``c`` holds the rows ``v`` with ``v % C == c``.

    The chunks are strided because a sharded vocabulary is split into contiguous parts. Every chunk then has
    rows on every device, and each scan step keeps all devices busy.
    """
    vocab, depth = weights.shape
    per_chunk = -(-vocab // chunks)
    padded = jnp.pad(weights, ((0, per_chunk * chunks - vocab), (0, 0))) if vocab % chunks else weights
    return shard_weight(jnp.swapaxes(padded.reshape(per_chunk, chunks, depth), 0, 1), (None, *_TABLE))


_TABLE = ("vocab", "embed")  # logical axes of the output embedding


def _split_tokens(x: Array, *axes: str | None) -> Array:
    """Split the tokens of ``x [*M ...]`` over the mesh like the learner's rows."""
    return constrain(x, *("rows", "time")[: x.ndim - len(axes)], *axes)


def wide_type(dtype: Any) -> Any:
    """Return the accumulation type: float32, or float64 for float64 inputs."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _chunk_logits(
    hidden: Array, chunk: Array, index: Array, vocab: int, chunks: int, temperature: float
) -> Array:
    wide = wide_type(hidden.dtype)
    logits = jnp.einsum("...d,vd->...v", hidden, chunk, preferred_element_type=wide)
    logits = _split_tokens(logits * jnp.asarray(1 / temperature, wide), "vocab")
    if vocab % chunks:
        exists = _entries(chunk, index, chunks, hidden.ndim) < vocab
        logits = jnp.where(exists, logits, jnp.asarray(LOWEST, wide))
    return logits


def _entries(chunk: Array, index: Array, chunks: int, ndim: int) -> Array:
    """Return the vocabulary entry of each row of a chunk, along the last of ``ndim`` axes."""
    entries = jnp.arange(chunk.shape[0], dtype=index.dtype) * chunks + index
    return entries.reshape((1,) * (ndim - 1) + entries.shape)


def _logit_of(tokens: Array, logits: Array, chunk: Array, index: Array, chunks: int) -> tuple[Array, Array]:
    """Return which tokens are in the chunk, and their logits there (arbitrary for the others)."""
    if num_shards("vocab") > 1:  # an index lookup would gather the logits of all devices
        is_mine = _entries(chunk, index, chunks, logits.ndim) == tokens[..., None]
        found = jnp.sum(jnp.where(is_mine, logits, jnp.zeros((), logits.dtype)), axis=-1)
    else:
        place = jnp.minimum(tokens // chunks, chunk.shape[0] - 1)
        found = jnp.take_along_axis(logits, place[..., None], axis=-1)[..., 0]
    return tokens % chunks == index, found


# Running maximum, sum of exponentials, sum of exponentials x logits, and the token's logit; each [*M].
Running = tuple[Array, Array, Array, Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _head(
    hidden: Array, weights: Array, tokens: Array, temperature: float, chunks: int
) -> tuple[Array, Array]:
    return _head_forward(hidden, weights, tokens, temperature, chunks)[0]


def _head_forward(
    hidden: Array, weights: Array, tokens: Array, temperature: float, chunks: int
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    vocab, wide = weights.shape[0], wide_type(hidden.dtype)

    def step(carry: Running, inputs: tuple[Array, Array]) -> tuple[Running, None]:
        largest, total, weighted, target = carry
        index, chunk = inputs
        chunk = gather_weight(chunk, _TABLE)
        logits = _chunk_logits(hidden, chunk, index, vocab, chunks, temperature)
        new_largest = jnp.maximum(largest, jnp.max(logits, axis=-1))
        decay = jnp.exp(largest - new_largest)
        shifted = logits - new_largest[..., None]
        exponentials = jnp.exp(shifted)
        # Sum shifted logits. With plain logits the entropy would be a small difference of large numbers.
        weighted = decay * (weighted + total * (largest - new_largest))
        weighted = weighted + jnp.sum(exponentials * shifted, axis=-1)
        total = total * decay + jnp.sum(exponentials, axis=-1)
        is_here, found = _logit_of(tokens, logits, chunk, index, chunks)
        target = jnp.where(is_here, found, target)
        return (new_largest, total, weighted, target), None

    zeros = jnp.zeros(tokens.shape, wide)
    carry = (jnp.full(tokens.shape, LOWEST, wide), zeros, zeros, zeros)
    inputs = (jnp.arange(chunks, dtype=tokens.dtype), _chunked(weights, chunks))
    (largest, total, weighted, target), _ = jax.lax.scan(step, carry, inputs)
    mean_shifted = weighted / total
    outputs = (target - largest - jnp.log(total), jnp.log(total) - mean_shifted)
    return outputs, (hidden, weights, tokens, largest + jnp.log(total), largest + mean_shifted)


def _head_backward(
    temperature: float, chunks: int, residuals: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None]:
    hidden, weights, tokens, normalizer, mean_logit = residuals
    g_logprob, g_entropy = cotangents
    vocab, wide = weights.shape[0], wide_type(hidden.dtype)

    def step(d_hidden: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        index, chunk = inputs
        chunk = gather_weight(chunk, _TABLE)
        logits = _chunk_logits(hidden, chunk, index, vocab, chunks, temperature)
        # Softmax of this chunk from the saved normalizer; d entropy / dz = -p (z - E_p z).
        probabilities = jnp.exp(logits - normalizer[..., None])
        surprise = logits - mean_logit[..., None]
        slope = -probabilities * (g_logprob[..., None] + g_entropy[..., None] * surprise)
        is_target = _entries(chunk, index, chunks, hidden.ndim) == tokens[..., None]
        slope = slope + jnp.where(is_target, g_logprob[..., None], jnp.zeros((), wide))
        slope = (slope * jnp.asarray(1 / temperature, wide)).astype(hidden.dtype)
        here = jnp.einsum("...v,vd->...d", slope, chunk, preferred_element_type=wide)
        d_hidden = d_hidden + _split_tokens(here, None)
        d_chunk = jnp.einsum("...v,...d->vd", slope, hidden, preferred_element_type=wide)
        return d_hidden, shard_weight(d_chunk.astype(weights.dtype), _TABLE)

    zeros = jnp.zeros(hidden.shape, wide)
    inputs = (jnp.arange(chunks, dtype=tokens.dtype), _chunked(weights, chunks))
    d_hidden, d_chunks = jax.lax.scan(step, zeros, inputs)
    d_weights = jnp.swapaxes(d_chunks, 0, 1).reshape(-1, weights.shape[1])[:vocab]
    return d_hidden.astype(hidden.dtype), shard_weight(d_weights, _TABLE), None


_head.defvjp(_head_forward, _head_backward)


# ------------------------------------------------------------------------------- some of the tokens only


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _masked_head(
    hidden: Array,
    weights: Array,
    tokens: Array,
    mask: Array,
    temperature: float,
    chunks: int,
    blocks: int,
) -> tuple[Array, Array]:
    """Compute the head of the tokens in the mask, block by block; zero elsewhere. Arrays are ``[M ...]``."""
    return _masked_forward(hidden, weights, tokens, mask, temperature, chunks, blocks)[0]


def _blocks_of(mask: Array, blocks: int) -> tuple[Array, Array]:
    """Return the places of all tokens ``[blocks, M / blocks]``, masked ones first, and the blocks in use."""
    order = jnp.argsort(jnp.logical_not(mask), stable=True).reshape(blocks, -1)
    return order, -(-jnp.sum(mask, dtype=jnp.int32) // order.shape[1])


def _masked_forward(
    hidden: Array,
    weights: Array,
    tokens: Array,
    mask: Array,
    temperature: float,
    chunks: int,
    blocks: int,
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    order, used = _blocks_of(mask, blocks)

    def step(block: Array, found: Array) -> Array:
        rows = order[block]
        outputs, saved = _head_forward(hidden[rows], weights, tokens[rows], temperature, chunks)
        return found.at[rows].set(jnp.stack([*outputs, *saved[3:]], axis=-1))

    nothing = jnp.zeros((*tokens.shape, 4), wide_type(hidden.dtype))
    # The number of rounds depends on the data: a while loop, which the backward pass repeats by itself.
    found = jax.lax.fori_loop(jnp.int32(0), used, step, nothing)
    # A block's rest holds tokens outside the mask: what was computed for them is not promised to anyone.
    logprobs, entropies = (jnp.where(mask, found[:, i], jnp.zeros((), found.dtype)) for i in range(2))
    return (logprobs, entropies), (hidden, weights, tokens, mask, found[:, 2], found[:, 3])


def _masked_backward(
    temperature: float,
    chunks: int,
    blocks: int,
    residuals: tuple[Array, ...],
    cotangents: tuple[Array, Array],
) -> tuple[Array, Array, None, None]:
    hidden, weights, tokens, mask, normalizer, mean_logit = residuals
    order, used = _blocks_of(mask, blocks)
    slopes = [jnp.where(mask, each, jnp.zeros((), each.dtype)) for each in cotangents]
    wide = wide_type(hidden.dtype)

    def step(block: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, (d_hidden, d_weights) = order[block], sums
        saved = hidden[rows], weights, tokens[rows], normalizer[rows], mean_logit[rows]
        here, d_table, _ = _head_backward(temperature, chunks, saved, (slopes[0][rows], slopes[1][rows]))
        return d_hidden.at[rows].set(here), d_weights + d_table.astype(wide)

    zeros = jnp.zeros_like(hidden), jnp.zeros(weights.shape, wide)
    d_hidden, d_weights = jax.lax.fori_loop(jnp.int32(0), used, step, zeros)
    return d_hidden, d_weights.astype(weights.dtype), None, None


_masked_head.defvjp(_masked_forward, _masked_backward)
